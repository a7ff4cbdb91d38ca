"""How exact float32 matrix products are."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from aq_lightning.kernels.products import fast_products, matmul_precision


def products(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """While it is open, float32 products on a GPU keep as many digits as results that are handed on in ``dtype``; on a
    CPU all (:func:`fast_products`).

    TensorFloat32 has the 11 significant bits of float16, and is several times as fast as float32.
    """
    if device.type == "cpu":
        return fast_products(device)
    return matmul_precision("high" if dtype.itemsize == 2 and device.type == "cuda" else "highest")
