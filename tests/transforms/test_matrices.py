"""Dense, Kronecker and across-head factors in all forms: exact both ways and invertible; what a clip cuts."""

from __future__ import annotations

from functools import partial
from typing import get_args

import pytest
import torch
from helpers import assert_close, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import SiteShape
from aq_lightning.quantizers import quantize_tokens
from aq_lightning.scheme import Grid
from aq_lightning.transforms import AcrossHeads, Clip, Dense, Diagonal, Factor, Kronecker, Transform
from aq_lightning.transforms.hadamard import hadamard, has_hadamard
from aq_lightning.transforms.kronecker import divided
from aq_lightning.transforms.parametrizations import Form, Start

SHAPE = SiteShape(2, 6, group=2)  # two heads of six channels, each read by two query heads
FORMS = [form for form in get_args(Form) if form != "fixed"]


def scrambled(kind: type[Factor], form: str = "free", shape: SiteShape = SHAPE) -> Factor:
    """Random and well away from where it starts."""
    factor = kind(shape, form=form)
    for parameter in factor.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return factor


def explicit(factor: Factor, channels: int) -> Tensor:
    """A, (channels, channels): the rows of I Aᵀ are A's columns."""
    return factor(torch.float64).transpose(torch.eye(channels, dtype=torch.float64)).mT.detach()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [Dense, Kronecker, AcrossHeads])
def test_directions_are_inverse_and_transpose(kind: type[Factor], form: str) -> None:
    factor = scrambled(kind, form)
    matrix = explicit(factor, 24)
    x = torch.randn(5, 24, dtype=torch.float64)
    both = factor(torch.float64)
    assert_close("x A⁻¹", x @ torch.linalg.inv(matrix), both.inverse(x), 1e-11)
    assert_close("w Aᵀ", x @ matrix.mT, both.transpose(x), 1e-13)
    assert relative_error(x, both.inverse(x)) > 0.05
    whole = factor.core()[0].detach() if kind is Dense else matrix  # of heads, the worst
    assert float(factor.condition()) == pytest.approx(float(torch.linalg.cond(whole).max()), rel=1e-9)
    assert factor(torch.float32).inverse(x.float()).dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_a_kronecker_factor_is_a_kronecker_product(form: str) -> None:
    factor = scrambled(Kronecker, form)
    left, right = (side()[0][0].detach() for side in (factor.left, factor.right))
    assert left.shape == (4, 4) and right.shape == (6, 6)
    assert_close("A", torch.kron(left, right), explicit(factor, 24), 1e-14)


def test_across_heads_keeps_channels_apart() -> None:
    factor = scrambled(AcrossHeads)
    expected = torch.kron(factor.core()[0][0].detach().contiguous(), torch.eye(6, dtype=torch.float64))
    assert_close("A", expected, explicit(factor, 24), 1e-14)


def test_shared_matrices_serve_all_heads() -> None:
    factor = scrambled(partial(Dense, shared=True))
    (matrix,) = factor.core()[0].detach()
    assert_close("A", torch.block_diag(*[matrix] * 4), explicit(factor, 24), 1e-14)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [Dense, Kronecker, AcrossHeads])
@pytest.mark.parametrize("direction", ["inverse", "transpose"])
def test_gradients(kind: type[Factor], form: str, direction: str) -> None:
    factor = scrambled(kind, form, SiteShape(2, 3))

    def through(x: Tensor, *_: Tensor) -> Tensor:
        return getattr(factor(torch.float64), direction)(x)  # gradcheck moves the parameters in place

    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(through, (x, *factor.parameters()))


@pytest.mark.parametrize("start", get_args(Start))
@pytest.mark.parametrize("form", get_args(Form))
def test_every_form_starts_orthogonal(form: str, start: str) -> None:
    matrix = explicit(Kronecker(SiteShape(1, 32), form=form, start=start), 32)
    assert_close("A Aᵀ", torch.eye(32, dtype=torch.float64), matrix @ matrix.mT, 1e-14)
    assert torch.equal(matrix, torch.eye(32, dtype=torch.float64)) == (start == "identity")
    flat = start in ("hadamard", "flat")
    assert not flat or bool(torch.allclose(matrix.abs(), torch.tensor(32**-0.5).double()))
    assert len(list(Kronecker(SiteShape(1, 32), form, start).parameters())) == 0 or form != "fixed"


@pytest.mark.parametrize("scale", [0.1, 10.0, 1e3])
def test_orthogonal_form_stays_orthogonal_and_others_invertible(scale: float) -> None:
    for form in ("orthogonal", "ldu", "svd"):
        factor = Dense(SiteShape(2, 8), form=form, start="random")
        for name, parameter in factor.named_parameters():
            if "log" not in name:
                parameter.data += scale * torch.randn_like(parameter)
        matrix, inverted = factor.core()
        assert matrix.isfinite().all()
        if form != "ldu":  # a product of triangles is as ill-conditioned as they are
            unit = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
            assert_close(form, unit, matrix @ inverted, 1e-9)
        if form == "orthogonal":
            assert float(factor.condition()) == pytest.approx(1, rel=1e-9)


@given(st.integers(1, 5000))
def test_divisors_are_the_nearest(channels: int) -> None:
    least, most = divided(channels, "random")
    assert least * most == channels and least <= most
    assert not any(channels % n == 0 for n in range(least + 1, int(channels**0.5) + 1))


@pytest.mark.parametrize(
    "channels, sizes, with_hadamard",
    [(576, (24, 24), (24, 24)), (1536, (32, 48), (32, 48)), (4096, (64, 64), (64, 64)), (14, (2, 7), None)]
    + [(11008, (86, 128), (32, 344)), (13824, (108, 128), (108, 128)), (14336, (112, 128), (112, 128))],
)
def test_divisors_of_published_widths(channels: int, sizes: tuple, with_hadamard: tuple | None) -> None:
    assert divided(channels, "random") == sizes
    if with_hadamard is None:
        with pytest.raises(RequestError, match="orders multiply to 14: start at random"):
            divided(channels, "hadamard")
    else:
        assert divided(channels, "hadamard") == with_hadamard


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 60, 76, 108, 140, 148, 344, 576])
def test_hadamard_matrices(size: int) -> None:
    """By Sylvester, by both of Paley's constructions, and in fields of 27 and 343 elements."""
    matrix = hadamard(size)
    assert_close("H Hᵀ", torch.eye(size, dtype=torch.float64), matrix @ matrix.mT, 1e-12)
    assert torch.equal(matrix.abs(), torch.full_like(matrix, size**-0.5)) or size > 1
    assert_close("|H|", torch.full_like(matrix, size**-0.5), matrix.abs(), 1e-14)


def test_orders_without_a_hadamard_matrix_are_known() -> None:
    assert not any(has_hadamard(size) for size in (0, 3, 6, 10, 14, 18, 86, 172))


def test_a_flat_start_is_random_where_there_is_no_hadamard_matrix() -> None:
    """86 · 128, the nearest divisors of 11008: only the second has one."""
    factor = Kronecker(SiteShape(1, 11008), start="flat")
    left, right = (side()[0][0].detach() for side in (factor.left, factor.right))
    assert torch.equal(left, Kronecker(SiteShape(1, 11008)).left()[0][0].detach())
    assert torch.equal(right, hadamard(128))


def test_bad_requests() -> None:
    with pytest.raises(RequestError, match="No Hadamard matrix of order 6"):
        Dense(SHAPE, start="hadamard")
    with pytest.raises(RequestError, match="trained as free, .* got 'cayley' and 'random'"):
        Kronecker(SHAPE, form="cayley")
    with pytest.raises(RequestError, match=r"Clip.start lies in \(0, 1\), got 1.5"):
        Clip(SHAPE, 1.5)


@pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (8, True)])
def test_clipping_first_is_quantizing_on_the_clipped_range(bits: int, symmetric: bool) -> None:
    """Against the grid of a range shrunk to σ(l) of its lower and σ(u) of its upper end, codes clamped."""
    grid, x = Grid(bits, symmetric=symmetric), torch.randn(7, 40, dtype=torch.float64) ** 3
    factor = Clip(SiteShape(1, 40), 0.9)
    factor.ends.data += torch.tensor([0.3, -1.2], dtype=torch.float64)
    (tensors,) = factor(torch.float64).online
    low, high = tensors["clip"].detach()
    cut = x.clamp(x.amin(-1, keepdim=True) * low, x.amax(-1, keepdim=True) * high)
    found = quantize_tokens(type(factor.operation())(**tensors)(x), grid)
    assert torch.equal(found, quantize_tokens(cut, grid)) and not torch.equal(found, quantize_tokens(x, grid))


def test_a_clip_learns() -> None:
    """Both ends get a gradient through what is cut and through the scale."""
    factor, x = Clip(SiteShape(1, 40), 0.9), torch.randn(7, 40, dtype=torch.float64)
    fraction = factor(torch.float64).online[0]["clip"]
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    cut = torch.maximum(torch.minimum(x, high * fraction[1]), low * fraction[0])
    (quantize_tokens(cut, Grid(4, symmetric=True)) - x).square().sum().backward()
    assert (factor.ends.grad != 0).all()


def test_online_factors_come_behind_what_folds() -> None:
    shape = SiteShape(1, 24)
    diagonal, mixing = Diagonal(shape), Kronecker(shape)
    diagonal.log_scale.data.normal_()
    x = torch.randn(3, 24, dtype=torch.float64)
    both = Transform([diagonal, mixing, Clip(shape)])(torch.float64)
    assert torch.equal(both.folded(x), diagonal(torch.float64).inverse(x))
    kinds = [type(factor.operation()) for factor in (mixing, Clip(shape))]
    product = kinds[0](**both.online[0])
    assert torch.equal(product(both.folded(x)), both.inverse(x)) and len(both.online) == 2
    assert product.multiply_adds(24) == 24 * (4 + 6)
