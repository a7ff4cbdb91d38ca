"""How matrices of float32 are multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_FLOAT32 = 1e-5  # relative error below which products are those of float32; bfloat16's are some thousand times that


@contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """While it is open, :func:`torch.set_float32_matmul_precision` is at ``level``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """While it is open, a CPU multiplies by the faster library of two that are equally exact; a GPU as it did.

    torch calls MKL, which leaves AVX-512 unused on other makers' processors than its own. oneDNN uses it, and torch
    calls it where products may be rounded to bfloat16, at level ``medium``; where :func:`onednn_is_exact` they are not.
    """
    if device.type != "cpu":
        yield
        return
    with matmul_precision("medium" if onednn_is_exact() else "highest"):
        yield


@cache
def onednn_is_exact() -> bool:
    """Whether oneDNN keeps float32 although it may round: it does on processors without matrix units (AMX), of which
    those that know bfloat16 gain by it. A product is tried too."""
    if not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return False
    a, b = (torch.linspace(-turns, turns, 256 * 256).sin().view(256, 256) for turns in (977, 1409))
    exact = a.double() @ b.double()
    with matmul_precision("medium"):
        return float((a @ b - exact).abs().max() / exact.abs().max()) < _FLOAT32
