"""Checkpoints that this package wrote, as transformers' ``from_pretrained`` loads them: packed, on the kernels.

A checkpoint with online products, or quantized keys and values, names this package in its ``config.json``
(``quant_method`` ``aq_lightning``), and importing this module registers who reads it. Any other is an ordinary
compressed-tensors checkpoint, which transformers gives to the package of that name; :func:`enable` says that those of
integer weights run here from now on. Importing changes nothing for them: other code in the same process may count on
what it loaded before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from aq_lightning.attention import attentions, hook_attention
from aq_lightning.deploy.linear import Int4Linear
from aq_lightning.deploy.stored import Headers, stored_state
from aq_lightning.errors import RequestError
from aq_lightning.export.compressed_tensors import LAYOUT_NOTE
from aq_lightning.export.compressed_tensors_config import METHOD, scheme_of, split_config
from aq_lightning.kernels.layout import Layout
from aq_lightning.models.weights import INDEX, SINGLE, with_stem
from aq_lightning.quantizers.activations import quantize_cache
from aq_lightning.scheme import Scheme
from aq_lightning.transforms.online import carrier, carry, carry_stored, drop

_CLAIMED = "compressed-tensors"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """A ``quantization_config`` as it stands in ``config.json``, and the scheme that it says.

    Raises:
        RequestError: it holds anything that is not understood here.
    """

    def __init__(self, **section: Any) -> None:
        self.section = section
        self.quant_method = METHOD
        inner, _, cache = split_config(section)
        self.own = inner is not section  # what nobody else runs: online products, quantized keys and values
        self.scheme: Scheme = replace(scheme_of(inner), **cache)
        self.layout: Layout | None = None  # until the weights' files say it

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.section)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts :class:`Int4Linear` where the checkpoint has packed weights, and online products where it has those."""

    requires_calibration = True
    quantization_config: PackedConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Called with the model's configuration before its files are looked for (by transformers from 5.18 on)."""
        return self._find_weights(config)

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The same of earlier versions."""
        return self._find_weights(config)

    def _find_weights(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Files of a model with online products are named so that nobody else takes them."""
        if self.quantization_config.own:
            single, index = with_stem(SINGLE, METHOD), with_stem(INDEX, METHOD)
            sharded = cached_file(config._name_or_path, index, _raise_exceptions_for_missing_entries=False)
            config.transformers_weights = single if sharded is None else index
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Makes the model, on the meta device, hold what the files hold."""
        whole = model.base_model is not model  # otherwise a model without a head, whose names lack the first part
        headers = Headers.read(checkpoint_files or [], "" if whole else f"{model.base_model_prefix}.")
        self.quantization_config.layout = headers.layout
        replaced = 0
        for path, linear in list(model.named_modules()):
            parts = headers.parts(path)
            if isinstance(linear, nn.Linear) and parts:
                model.set_submodule(path, Int4Linear.expecting(linear, self.quantization_config.scheme, parts))
                replaced += 1
        if replaced < headers.packed:
            raise RequestError(
                f"Packed weights run in linears, got {headers.packed - replaced} of others, such as experts: load the "
                "model dequantized, with aq_lightning.export.loading.open_model."
            )
        carry_stored(model, {n: each.to(model.dtype) for n, each in headers.tensors.items() if carrier(n)})

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Packs layer after layer, so that no more than one is held twice."""
        for module in model.modules():
            if isinstance(module, Int4Linear):
                module.pack(self.quantization_config.layout)
        grid = self.quantization_config.scheme.key_value
        for attention in attentions(model) if grid is not None else ():
            hook_attention(attention, partial(quantize_cache, grid=grid))
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: the tensors of the checkpoint that was loaded.

        Raises:
            RequestError: the model has online products, or quantized keys and values.
        """
        config = self.quantization_config
        if config.own:
            raise RequestError(
                "A model that only this package runs is saved under names that nothing else takes for its own, got "
                "save_pretrained, which has only those: copy the directory that it was loaded from."
            )
        layout = config.layout or "padded"
        return stored_state(model, config.scheme, layout), {LAYOUT_NOTE: layout}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Ordinary linears, as ``model.dequantize()`` asks for; activations are no longer rounded."""
        for path, module in list(model.named_modules()):
            if isinstance(module, Int4Linear):
                weight = module.unpack().dequantize(torch.float32).to(dtype)
                with torch.device("meta"):
                    linear = nn.Linear(module.in_features, module.out_features, bias=False)
                linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), module.bias
                online = drop(module)
                if online is not None:
                    carry(linear, list(online))
                model.set_submodule(path, linear)
        return model


class _Claiming:
    """What stands for compressed-tensors' own configuration while :func:`enable` holds: integer weights run here, all
    else (floating-point formats, several groups, …) where it did."""

    own = AUTO_QUANTIZATION_CONFIG_MAPPING[_CLAIMED]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """:class:`PackedConfig` where it understands the section, otherwise what would have been."""
        kind = PackedConfig
        try:
            PackedConfig.from_dict(config_dict)
        except RequestError:
            kind = cls.own
        return kind.from_dict(config_dict, **kwargs)


def enable() -> None:
    """From now on, in this process, ``from_pretrained`` runs compressed-tensors checkpoints of integer weights on this
    package's kernels."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[_CLAIMED] = _Claiming


def disable() -> None:
    """Gives them back to the package compressed-tensors."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[_CLAIMED] = _Claiming.own


@contextmanager
def enabled() -> Iterator[None]:
    """:func:`enable` for a while."""
    before = AUTO_QUANTIZATION_CONFIG_MAPPING[_CLAIMED]
    enable()
    try:
        yield
    finally:
        AUTO_QUANTIZATION_CONFIG_MAPPING[_CLAIMED] = before
