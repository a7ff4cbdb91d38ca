"""How exact float32 matrix products are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """While it is open, float32 products on a GPU keep as many digits as results that are handed on in ``dtype``.

    TensorFloat32 has the 11 significant bits of float16, and is several times as fast as float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype.itemsize == 2 and device.type == "cuda" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
