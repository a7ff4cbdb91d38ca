"""Every way to invert agrees with torch.linalg.inv, derivative included, and one that fails is noticed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import assert_close, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import SiteShape
from aq_lightning.transforms import Affine
from aq_lightning.transforms.inverse import MIXED_TOLERANCE, TOLERANCE, Method, _inverse, inverse

METHODS = ["lu", "newton", "pivoted"]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def dominant(blocks: int, size: int, ratio: float = 0.9, device: str = "cpu", decades: float = 4) -> Tensor:
    """Random rows whose off-diagonals sum to ``ratio`` of diagonals that span decades around 1."""
    matrix = torch.randn(blocks, size, size, dtype=torch.float64)
    matrix.diagonal(dim1=-2, dim2=-1).zero_()
    matrix = ratio * matrix / matrix.abs().sum(-1, keepdim=True).clamp(min=1e-300)
    matrix.diagonal(dim1=-2, dim2=-1).fill_(1)
    return (matrix * 10 ** (decades * (torch.rand(blocks, size, 1, dtype=torch.float64) - 0.5))).to(device)


def near(matrix: Tensor) -> Tensor:
    """Almost the inverse: of residual 0.3."""
    defect = torch.randn_like(matrix)
    defect = 0.3 * defect / defect.abs().sum(-1, keepdim=True)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.inv(matrix) @ (identity - defect)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 2, 7, 64, 128, 131, 300])
@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_torch(method: Method, size: int, device: str) -> None:
    matrix = dominant(3, size, device=device)
    found, residual = inverse(matrix, method, near(matrix))
    assert_close("inverse", torch.linalg.inv(matrix), found, 1e-12)
    assert float(residual) <= 1e-11
    defect = torch.eye(size, dtype=torch.float64, device=device) - matrix @ found
    assert float(residual) == pytest.approx(float(defect.abs().sum(-1).max()), abs=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    blocks=st.integers(1, 4),
    ratio=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    method=st.sampled_from(METHODS),
    leaf=st.sampled_from([1, 2, 5, 128]),
    seed=st.integers(0, 99),
)
def test_dominant_matrices_need_no_pivoting(size, blocks, ratio, method, leaf, seed) -> None:
    """However small the blocks that are eliminated one after another, ragged halves included."""
    torch.manual_seed(seed)
    matrix = dominant(blocks, size, ratio)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aq_lightning.transforms.inverse._LEAF", leaf)
        found, residual = inverse(matrix, method, near(matrix), wait=False)
    assert float(residual) <= 1e-11
    assert_close("inverse", torch.linalg.inv(matrix), found, 1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_derivative(method: Method, device: str) -> None:
    """Against finite differences, and against the derivative of torch.linalg.inv."""
    matrix = dominant(2, 5, 0.5, device).requires_grad_()
    start = torch.linalg.inv(matrix.detach())
    assert torch.autograd.gradcheck(lambda m: inverse(m, method, start)[0], (matrix,))
    weight = torch.randn(2, 5, 5, dtype=torch.float64, device=device)
    (reference,) = torch.autograd.grad((torch.linalg.inv(matrix) * weight).sum(), matrix)
    (own,) = torch.autograd.grad((inverse(matrix, method, start)[0] * weight).sum(), matrix)
    assert_close("gradient", reference, own, 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_the_operator_is_a_good_citizen(method: Method, device: str) -> None:
    """Schema, shapes without data, autograd registration and dynamic shapes, as torch checks them."""
    matrix = dominant(2, 6, device=device).requires_grad_()
    torch.library.opcheck(_inverse, (matrix, near(matrix.detach()), method, False))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the compiler itself
@pytest.mark.parametrize("method", METHODS)
def test_compiles_into_one_graph(method: Method) -> None:
    affine = Affine(SiteShape(2, 6), 0.5, inverse=method)
    affine.open_band(0, 1)
    affine.matrix.data.copy_(dominant(2, 6, 0.5))
    x = torch.randn(3, 12, dtype=torch.float64)
    plain = affine(torch.float64).inverse(x)
    compiled = torch.compile(lambda x: affine(torch.float64).inverse(x), fullgraph=True)(x)
    assert_close("x A⁻¹", plain, compiled, 1e-13)
    gradients = [torch.autograd.grad((y**2).sum(), affine.matrix)[0] for y in (plain, compiled)]
    assert_close("gradient", *gradients, 1e-12)
    assert 0 < float(affine.residual) < 1e-12


def swap(size: int) -> Tensor:
    """Invertible, but its leading half is zero: elimination breaks down without pivoting."""
    return torch.eye(size, dtype=torch.float64).roll(size // 2, 0)[None]


@pytest.mark.parametrize("method, matrix", [("lu", swap(300)), ("newton", swap(6)), ("mixed", swap(6))])
def test_what_fails_is_noticed_and_done_again(method: Method, matrix: Tensor) -> None:
    start = torch.eye(matrix.shape[-1], dtype=torch.float64)[None]
    found, residual = inverse(matrix, method, start, wait=False)
    assert not float(residual) <= TOLERANCE and not relative_error(matrix.mT, found) <= TOLERANCE
    found, residual = inverse(matrix, method, start)
    assert float(residual) == 0 and torch.equal(found, matrix.mT)


def test_a_singular_matrix_is_noticed() -> None:
    for singular in (torch.zeros(1, 4, 4, dtype=torch.float64), torch.ones(2, 3, 3, dtype=torch.float64)):
        assert not float(inverse(singular)[1]) <= TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("size", [1, 7, 131, 300])
def test_mixed_precision_stays_within_its_bound(size: int, precision: str, device: str) -> None:
    """Whatever torch lets float32 products be, and so does the derivative; wilder rows it does not pass off as done."""
    matrix = dominant(3, size, 0.8, device=device, decades=1).requires_grad_()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found, bound = inverse(matrix, "mixed", near(matrix.detach()), wait=False)
        weight = torch.randn_like(found)
        (own,) = torch.autograd.grad((found * weight).sum(), matrix)
    finally:
        torch.set_float32_matmul_precision(before)
    identity = torch.eye(size, dtype=torch.float64, device=device)
    residual = (identity - matrix @ found).abs().sum(-1).max().detach()
    assert float(residual) <= float(bound.detach()) <= MIXED_TOLERANCE
    (exact,) = torch.autograd.grad((torch.linalg.inv(matrix) * weight).sum(), matrix)
    assert_close("gradient", exact, own, 1e-2 if precision == "high" else 1e-4)
    wild = dominant(3, size, 0.8, device=device, decades=8)
    found, bound = inverse(wild, "mixed", near(wild), wait=False)
    assert float((identity - wild @ found).abs().sum(-1).max()) <= float(bound)


def test_newton_follows_training() -> None:
    """Over steps as an optimizer takes them; without gradients it does not trust where it stood."""
    affine, reference = (Affine(SiteShape(2, 16), 0.5, inverse=method) for method in ("newton", "pivoted"))
    x = torch.randn(4, 32, dtype=torch.float64)
    for step in range(20):
        for each in (affine, reference):
            each.open_band(step // 5, 4)
            with torch.no_grad():
                torch.manual_seed(step)
                each.matrix += 1e-2 * torch.randn_like(each.matrix)
            each.project()
        assert_close("x A⁻¹", reference(torch.float64).inverse(x), affine(torch.float64).inverse(x), 1e-11)
    affine.doubt()
    assert affine.method == "newton" and float(affine.residual) <= TOLERANCE
    affine.matrix.data.copy_(torch.diag_embed(torch.full((2, 16), 7.0)))
    with torch.no_grad():
        assert_close("x A⁻¹", x / 7, affine(torch.float64).inverse(x), 1e-14)


def test_a_doubtful_inverse_turns_to_pivoting() -> None:
    affine = Affine(SiteShape(1, 4))
    affine.doubt()
    assert affine.method == "lu"
    affine.residual.fill_(2 * TOLERANCE)
    affine.doubt()
    assert affine.method == "pivoted"


def test_free_matrices_are_pivoted() -> None:
    assert Affine(SiteShape(1, 4), dominance=None, inverse="newton").method == "pivoted"


@pytest.mark.parametrize("method", METHODS)
def test_the_file_does_not_change_with_the_method(method: Method) -> None:
    assert set(partial(Affine, inverse=method)(SiteShape(1, 4)).state_dict()) == {"matrix", "mask"}


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(RequestError, match="one of lu, mixed, newton, normal, pivoted, got 'cholesky'"):
        Affine(SiteShape(1, 4), inverse="cholesky")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 2, 24, 64, 128, 131, 300])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5])
def test_normal_equations_invert_any_matrix(size: int, condition: float, device: str) -> None:
    """Without dominance: random singular vectors around values down to 1 / condition; derivative included."""
    (left, right), values = torch.randn(2, 2, size, size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    values = values if size == 1 else torch.logspace(0, -float(torch.tensor(condition).log10()), size).double()
    matrix = (torch.linalg.qr(left)[0] * values @ torch.linalg.qr(right)[0]).to(device).requires_grad_()
    found, residual = inverse(matrix, "normal", wait=False)
    exact = torch.linalg.inv(matrix)
    assert_close("inverse", exact.detach(), found.detach(), 1e-15 * max(condition, 10) ** 2)
    assert float(residual.detach()) <= 1e-9 * condition
    weights = torch.randn_like(exact)
    expected, grown = (
        torch.autograd.grad((each * weights).sum(), matrix, retain_graph=True)[0] for each in (exact, found)
    )
    assert_close("gradient", expected, grown, 1e-14 * max(condition, 10) ** 2)


@pytest.mark.parametrize("size", [3, 24, 200])
def test_normal_equations_invert_what_cayleys_map_needs(size: int) -> None:
    """I + S with S skew and large."""
    skew = 10 * torch.randn(2, size, size, dtype=torch.float64)
    matrix = torch.eye(size, dtype=torch.float64) + skew - skew.mT
    found, residual = inverse(matrix, "normal", wait=False)
    assert_close("inverse", torch.linalg.inv(matrix), found, 1e-9)
