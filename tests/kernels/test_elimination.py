"""The kernel that inverts small matrices against its plain form and against LAPACK."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.kernels.elimination import LARGEST, eliminate, naive

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def dominant(*shape: int) -> Tensor:
    matrix = torch.randn(*shape, shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))
    matrix = 0.9 * matrix / matrix.abs().sum(-1, keepdim=True)
    return (matrix + torch.diag(1 + torch.arange(shape[-1]) % 5)).to(DEVICE)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 33, 64])
def test_kernel_equals_the_plain_form_and_lapack(size: int) -> None:
    matrix = dominant(3, size)
    found = eliminate(matrix)
    assert_close("the plain form", naive.eliminate(matrix), found, 1e-14)
    assert_close("LAPACK", torch.linalg.inv(matrix), found, 1e-13)


def test_views_and_many_dimensions() -> None:
    matrix = dominant(2, 2, 40)
    assert_close("a view", torch.linalg.inv(matrix[..., 3:23, 3:23]), eliminate(matrix[..., 3:23, 3:23]), 1e-13)
    assert_close("transposed", torch.linalg.inv(matrix).mT, eliminate(matrix.mT), 1e-13)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter
def test_a_zero_pivot_is_not_finite_and_nothing_else() -> None:
    matrix = dominant(3, 8)
    matrix[1, 0, 0] = 0
    finite = eliminate(matrix).isfinite().flatten(1).all(1)
    assert finite.tolist() == [True, False, True]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter would take a minute")
def test_the_largest() -> None:
    matrix = dominant(4, LARGEST)
    assert_close("LAPACK", torch.linalg.inv(matrix), eliminate(matrix), 1e-13)


def test_larger_matrices_are_refused() -> None:
    with pytest.raises(RequestError, match="at most 128 wide, got 129"):
        eliminate(torch.eye(129, dtype=torch.float64, device=DEVICE))
