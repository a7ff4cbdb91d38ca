"""Formats of bitsandbytes, which need no calibration, for comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from aq_lightning.errors import RequestError

Reference = Literal["nf4", "int8"]
"""``nf4``: 16 quantiles of a normal distribution, one float32 scale for 64 weights (QLoRA, arXiv 2305.14314). ``int8``:
weights per row and activations per token, but for channels with activations above 6 (LLM.int8(), arXiv 2208.07339)."""

_BLOCK = 64  # weights that share a scale of nf4
_OUTLIER = 6.0  # activations that int8 leaves in full precision


def reference_bits(linears: Iterable[nn.Linear], kind: Reference) -> float:
    """Effective bits per weight: codes, float32 scales and biases."""
    bits = weights = 0
    for linear in linears:
        numbers, rows = linear.weight.numel(), linear.weight.shape[0]
        bits += 4 * numbers + 32 * -(-numbers // _BLOCK) if kind == "nf4" else 8 * numbers + 32 * rows
        bits += 0 if linear.bias is None else linear.bias.numel() * torch.finfo(linear.bias.dtype).bits
        weights += numbers
    return bits / weights


@contextmanager
def replaced(blocks: Iterable[nn.Module], kind: Reference, device: torch.device) -> Iterator[None]:
    """While it is open, every linear of the blocks is bitsandbytes' own, on ``device``; the originals return after.

    Raises:
        RequestError: bitsandbytes cannot compute on that device.
    """
    originals = []
    try:
        for block in blocks:
            for name, linear in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
                originals.append((block, name, linear))
                block.set_submodule(name, _converted(linear, kind, device))
        yield
    finally:
        for block, name, linear in originals:
            block.set_submodule(name, linear)


def check_reference(kind: Reference, device: torch.device) -> None:
    """Tries it on a small linear.

    Raises:
        RequestError: bitsandbytes cannot compute on that device.
    """
    try:
        answer = _converted(nn.Linear(_BLOCK, _BLOCK), kind, device)(torch.ones(1, _BLOCK, device=device))
    except (ImportError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise RequestError(
            f"A reference runs on the device of the calibration, got {kind} on {device}, where bitsandbytes fails "
            f"({error}): leave it out of model.references."
        ) from error
    if not bool(answer.isfinite().all()):
        raise RequestError(f"A reference answers numbers, got {kind} on {device}: leave it out of model.references.")


def _converted(linear: nn.Linear, kind: Reference, device: torch.device) -> nn.Module:
    """The linear in bitsandbytes' format; the package is only imported where it is asked for."""
    from bitsandbytes import nn as bitsandbytes

    outputs, inputs = linear.weight.shape
    weight, biased = linear.weight.detach().float().contiguous(), linear.bias is not None
    if kind == "nf4":
        new = bitsandbytes.Linear4bit(
            inputs, outputs, biased, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4"
        )
        new.weight = bitsandbytes.Params4bit(
            weight, requires_grad=False, blocksize=_BLOCK, compress_statistics=False, quant_type="nf4", module=new
        )
    else:
        new = bitsandbytes.Linear8bitLt(inputs, outputs, biased, has_fp16_weights=False, threshold=_OUTLIER)
        new.weight = bitsandbytes.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if biased:
        new.bias = nn.Parameter(linear.bias.detach().float(), requires_grad=False)
    return new.to(device)
