"""What a checkpoint's files say of their tensors, before any is read; and the tensors of a packed model as files hold
them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from aq_lightning.deploy.fused import Joint, Part
from aq_lightning.deploy.linear import Int4Linear
from aq_lightning.export.compressed_tensors import LAYOUT_NOTE, pack
from aq_lightning.export.compressed_tensors_config import format_of
from aq_lightning.kernels.layout import Layout
from aq_lightning.scheme import Scheme

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8,
}  # fmt: skip
_PACKED = "weight_packed"
_PARTS = (_PACKED, "weight_scale", "weight_zero_point", "weight_shape")
_INTEGERS = ("weight", "weight_scale")


@dataclass(frozen=True)
class Headers:
    """Names, shapes and dtypes of stored tensors."""

    tensors: dict[str, Tensor]
    """By their names in the model, on the meta device."""
    layout: Layout | None
    """How words are filled, where the files say it."""

    @staticmethod
    def read(files: Iterable[str], prefix: str = "") -> Headers:
        """Of the safetensors files given.

        Args:
            files: their paths.
            prefix: of names in the files, which the model lacks.
        """
        tensors, layout = {}, None
        for path in files:
            with safe_open(path, framework="pt") as file:
                layout = (file.metadata() or {}).get(LAYOUT_NOTE, layout)
                for name in file.keys():
                    part = file.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype(), torch.float32)  # others are no packed weight's
                    tensors[name.removeprefix(prefix)] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        return Headers(tensors, cast("Layout | None", layout))

    def parts(self, path: str) -> dict[str, Tensor]:
        """Parts of the quantized weight of the module at ``path``; nothing if its weight is not quantized."""
        names = _PARTS if f"{path}.{_PACKED}" in self.tensors else _INTEGERS
        found = {name: self.tensors[f"{path}.{name}"] for name in names if f"{path}.{name}" in self.tensors}
        return found if len(found) > 1 else {}  # a weight alone is an ordinary one

    @property
    def packed(self) -> int:
        """Number of packed weights."""
        return sum(name.endswith(_PACKED) for name in self.tensors)


def stored_state(model: PreTrainedModel, scheme: Scheme, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a model with packed linears, joined or not, under the names and in the form of its checkpoint."""
    modules = dict(model.named_modules())
    packed = [path for path, module in modules.items() if isinstance(module, Int4Linear)]
    held = {f"{path}.{name}" for path in packed for name in ("words", "scales", "bias")}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in held}
    for path, module in modules.items():
        if isinstance(module, Part):
            weight, bias = module.unpack()
        elif isinstance(module, Int4Linear) and not isinstance(modules[path.rpartition(".")[0]], Joint):
            weight, bias = module.unpack(), module.bias
        else:
            continue
        state |= {name: t.cpu() for name, t in pack({f"{path}.weight": weight}, layout, format_of(scheme)).items()}
        if bias is not None:
            state[f"{path}.bias"] = bias.detach()
    return state
