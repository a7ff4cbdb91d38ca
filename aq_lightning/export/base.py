"""What all checkpoint formats share: their interface, and what they refuse before any work.

A format is a module of pure functions, ``pack`` (weights → stored tensors), ``write`` and ``read``, each the inverse of
another; :class:`Format` puts them side by side for whoever writes, checks and describes checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from aq_lightning.errors import RequestError
from aq_lightning.export.directory import StoredTensors
from aq_lightning.models.loading import skeleton
from aq_lightning.models.lookup import architecture_of
from aq_lightning.qtensor import QTensor
from aq_lightning.scheme import Scheme

Weights = Mapping[str, QTensor | Tensor]

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Subject:
    """The model to be stored, before any weight is read."""

    config: Mapping[str, Any]
    """Content of its ``config.json``, without a ``quantization_config``."""
    scheme: Scheme
    """Integers of every quantized weight, and of activations."""
    storage: torch.dtype
    """Dtype of scales and of whatever is not quantized."""
    ignore: Sequence[str] = ()
    """Module paths of the linears in full precision."""
    files: Sequence[Path] = ()
    """What travels along: tokenizer, generation configuration, licence."""

    @property
    def model_config(self) -> PreTrainedConfig:
        """The configuration as transformers reads it."""
        fields = {name: value for name, value in self.config.items() if name != "model_type"}
        return AutoConfig.for_model(self.config["model_type"], **fields)

    @property
    def experts(self) -> str:
        """Field of the configuration that counts experts; empty for a dense model."""
        return next((name for name in _EXPERTS if self.config.get(name)), "")

    def blocks(self) -> nn.ModuleList:
        """The model's blocks, on the meta device."""
        config = self.model_config
        return skeleton(config).get_submodule(architecture_of(config).blocks)

    def linears(self) -> dict[str, nn.Linear]:
        """Linears of the first block by name, on the meta device."""
        found = self.blocks()[0].named_modules()
        return {name: module for name, module in found if isinstance(module, nn.Linear)}


@dataclass(frozen=True)
class Client:
    """Someone else's code that loads a format."""

    open: Callable[[Path], PreTrainedModel]
    """Directory → model in float32."""
    tolerance: float = 0.0
    """Greatest difference of its logits from the quantized model's, RMS over RMS."""


@dataclass(frozen=True)
class Format:
    """One way of storing a quantized model."""

    name: str
    """As the command line takes it."""
    check: Callable[[Subject], None]
    """Raises :class:`RequestError` if the format cannot hold the subject."""
    pack: Callable[[Weights, Scheme], Mapping[str, Any]]
    """Weights → stored tensors, as far as one shard can be packed alone; what is packed already stays."""
    write: Callable[..., None]
    """``write(out, config, shards, scheme, ignore=…, extra_files=…)``: a directory, whole or not at all."""
    read: Callable[[Path], tuple[Scheme | None, Weights]]
    """The scheme, and lazily the weights, of such a directory; weights that are no longer integers have no scheme."""
    client: Callable[[Subject], Client | str]
    """Who loads such a directory here; or why nobody does."""
    sharded: bool = True
    """Whether tensors go into files of a size that can be chosen; if not, into one."""


class Checkpoint(Mapping[str, "QTensor | Tensor"]):
    """The weights of a directory by name, each read from its file when asked for.

    Args:
        tensors: what is stored.
        parts: suffixes that stand for ``.weight`` in the stored tensors of a quantized weight; the first always occurs.
        decompress: (weight's name, stored tensors) → the weight.
    """

    def __init__(
        self,
        tensors: StoredTensors,
        parts: Sequence[str],
        decompress: Callable[[str, Mapping[str, Tensor]], QTensor],
    ) -> None:
        self._tensors = tensors
        self._decompress = decompress
        stems = [name.removesuffix(parts[0]) for name in tensors if name.endswith(parts[0])]
        stored = {stem + part for stem in stems for part in parts}
        quantized = {f"{stem}.weight": True for stem in stems}
        self._quantized = {name: False for name in tensors if name not in stored} | quantized

    def __getitem__(self, name: str) -> QTensor | Tensor:
        return self._decompress(name, self._tensors) if self._quantized[name] else self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._quantized))

    def __len__(self) -> int:
        return len(self._quantized)


def stem(name: str, form: str) -> str:
    """Path of the linear that owns a quantized weight.

    Raises:
        RequestError: it is not called ``<linear>.weight``, as the format needs.
    """
    if not name.endswith(".weight"):
        raise RequestError(f"{form} holds weights of linears, got {name}: export compressed-tensors.")
    return name.removesuffix(".weight")


def check_weights_only(subject: Subject, form: str) -> None:
    """Refuses what formats of weights alone have no word for.

    Raises:
        RequestError: quantized activations, or experts.
    """
    if subject.scheme.activation is not None or subject.scheme.key_value is not None:
        raise RequestError(
            f"{form} holds quantized weights only, got {subject.scheme}, which quantizes activations too: "
            "export compressed-tensors, or calibrate an a16 scheme."
        )
    check_no_experts(subject, form)


def check_no_experts(subject: Subject, form: str) -> None:
    """
    Raises:
        RequestError: the model is a mixture of experts.
    """
    if subject.experts:
        raise RequestError(
            f"{form} is written for dense models here, got {subject.experts} {subject.config[subject.experts]}: "
            "export compressed-tensors."
        )


def check_bits(subject: Subject, allowed: Sequence[int], form: str) -> None:
    """
    Raises:
        RequestError: the weights' bits are not among ``allowed``.
    """
    if subject.scheme.weight.bits not in allowed:
        raise RequestError(
            f"{form} holds weights of {' or '.join(map(str, allowed))} bits, got {subject.scheme}: "
            "export compressed-tensors, or calibrate another scheme."
        )


def check_sixteen_bits(subject: Subject, form: str) -> None:
    """
    Raises:
        RequestError: scales are wider than 16 bits.
    """
    if torch.finfo(subject.storage).bits != 16:
        raise RequestError(
            f"{form} holds scales of 16 bits, got {subject.storage}: calibrate the model from float16 or bfloat16 "
            "weights, or export compressed-tensors."
        )


def check_word_shapes(subject: Subject, form: str, *, inputs: int, outputs: int) -> None:
    """
    Raises:
        RequestError: a linear's inputs or outputs do not fill whole words.
    """
    for name, linear in subject.linears().items():
        rows, columns = linear.weight.shape
        if rows % outputs or columns % inputs:
            raise RequestError(
                f"{form} packs multiples of {inputs} inputs and {outputs} outputs, got {name} with {columns} inputs "
                f"and {rows} outputs: export compressed-tensors."
            )
