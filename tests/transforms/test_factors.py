"""Each factor is the map that its formula says, in both directions, and starts where its paper says."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from helpers import assert_close, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import SiteShape
from aq_lightning.transforms import Affine, Diagonal, Factor, PairScale, RopePair, Shift, SiteStatistics, Transform
from aq_lightning.transforms.affine import band_width, gradual_mask
from aq_lightning.transforms.base import condition_by_products

SHAPE = SiteShape(2, 6)
FACTORS = [Diagonal, Affine, RopePair, PairScale]


def scrambled(kind: type[Factor], shape: SiteShape = SHAPE) -> Factor:
    """Random and well away from the identity; every parameter stays trainable."""
    factor = kind(shape)
    for parameter in factor.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    if isinstance(factor, Affine):
        factor.open_band(0, 1)
    return factor


def explicit(factor: Factor, shape: SiteShape = SHAPE) -> Tensor:
    """A, (channels, channels), read off the weights' direction: the rows of I Aᵀ are A's columns."""
    return factor(torch.float64).transpose(torch.eye(shape.channels, dtype=torch.float64)).mT.detach()


def slow_mask(size: int, width: int, stability: float) -> Tensor:
    """The paper's equation 6, entry by entry."""
    mask = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            if i == j:
                mask[i, j] = 1.0
            elif 0 < abs(i - j) <= width:
                mask[i, j] = stability
    return mask


@pytest.mark.parametrize("width", range(17))
def test_gradual_mask_is_the_papers(width: int) -> None:
    like = torch.zeros((), dtype=torch.float64)
    assert bool((gradual_mask(17, width, 0.3, like) == slow_mask(17, width, 0.3)).all())


@given(st.integers(1, 60), st.integers(1, 300))
def test_band_opens_from_the_diagonal_to_the_corner(epochs: int, size: int) -> None:
    widths = [band_width(epoch, epochs, size) for epoch in range(epochs)]
    assert widths == sorted(widths) and widths[-1] == size - 1
    assert epochs == 1 or widths[0] == 0
    if 1 < epochs:
        steps = [after - before for before, after in zip(widths, widths[1:], strict=False)]
        assert max(steps) - min(steps) <= 1, "evenly"


def test_corners_open_where_floating_point_leaves_them_shut() -> None:
    """The reference's int((d − 1) / (E − 1) · e) is 4094 there."""
    assert int((4096 - 1) / (20 - 1) * 19) < 4095 == band_width(19, 20, 4096)


def published_mask(heads: int, size: int, epoch: int, epochs: int, stability: float) -> Tensor:
    """The published code's band on the diagonal blocks of (heads · size, heads · size), entry by entry."""
    opened = int((heads * size / heads - 1) / (epochs - 1) * epoch) + 1
    mask = torch.zeros(heads * size, heads * size, dtype=torch.float64)
    for i in range(heads * size):
        for j in range(heads * size):
            if i == j:
                mask[i, j] = 1.0
            elif i // size == j // size and abs(i - j) < opened:
                mask[i, j] = stability
    return mask


@pytest.mark.parametrize("heads, size", [(1, 60), (4, 15), (6, 10)])
def test_paper_schedule_is_the_published_formula(heads: int, size: int) -> None:
    """Over the hidden size and per head, at every epoch."""
    affine = Affine(SiteShape(heads, size), 0.1)
    for epochs in range(2, 24):
        for epoch in range(epochs):
            affine.open_band(epoch, epochs, "paper")
            expected = published_mask(heads, size, epoch, epochs, 0.1)
            assert torch.equal(torch.block_diag(*[affine.mask] * heads), expected)


def test_paper_schedule_leaves_corners_shut_where_the_published_code_does() -> None:
    sizes = [(size, epochs) for size in (64, 128, 576, 768, 2048, 4096, 5120) for epochs in range(2, 41)]
    shut = 0
    for size, epochs in sizes:
        for epoch in range(epochs):
            assert band_width(epoch, epochs, size, "paper") == int((size - 1) / (epochs - 1) * epoch)
        shut += band_width(epochs - 1, epochs, size, "paper") < size - 1
    assert band_width(19, 20, 4096, "paper") == 4094 and shut > 1


@given(st.integers(1, 9), st.integers(1, 40))
def test_without_a_schedule_all_is_open_at_once(epochs: int, size: int) -> None:
    assert {band_width(epoch, epochs, size, "none") for epoch in range(epochs)} == {size - 1}


def test_affine_is_its_masked_matrix() -> None:
    factor = scrambled(Affine)
    factor.open_band(1, 3)  # width 2 of 5
    effective = factor.matrix.detach() * slow_mask(6, 2, 0.1)
    assert torch.equal(factor.effective(), effective)
    assert_close("A", torch.block_diag(*effective), explicit(factor), 1e-14)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("kind", FACTORS)
def test_directions_are_inverse_and_transpose(kind: type[Factor], group: int) -> None:
    """Against torch.linalg.inv of the explicit matrix, for members that repeat each block ``group`` times."""
    factor = scrambled(kind)
    matrix = torch.block_diag(*(block for each in blocks_of(explicit(factor)) for block in [each] * group))
    x = torch.randn(5, SHAPE.channels * group, dtype=torch.float64)
    both = factor(torch.float64)
    assert_close("x A⁻¹", x @ torch.linalg.inv(matrix), both.inverse(x), 1e-12)
    assert_close("w Aᵀ", x @ matrix.mT, both.transpose(x), 1e-12)
    assert relative_error(x, both.inverse(x)) > 0.05


def blocks_of(matrix: Tensor) -> list[Tensor]:
    """The diagonal blocks of (channels, channels); nothing lies outside them."""
    blocks = [matrix[k : k + 6, k : k + 6] for k in (0, 6)]
    assert torch.equal(torch.block_diag(*blocks), matrix)
    return blocks


@pytest.mark.parametrize("kind", FACTORS)
def test_identity_at_first(kind: type[Factor]) -> None:
    assert torch.equal(explicit(kind(SHAPE)), torch.eye(12, dtype=torch.float64))
    assert float(kind(SHAPE).condition()) == pytest.approx(1)


@pytest.mark.parametrize("kind", FACTORS)
def test_condition_number(kind: type[Factor]) -> None:
    factor = scrambled(kind)
    worst = max(float(torch.linalg.cond(block)) for block in blocks_of(explicit(factor)))
    assert float(factor.condition()) == pytest.approx(worst, rel=1e-10) and worst > 1.1


@pytest.mark.parametrize("least", [1, 1e-3, 1e-6])
def test_condition_by_products_is_that_by_singular_values(least: float) -> None:
    sides = torch.linalg.qr(torch.randn(2, 3, 24, 24, dtype=torch.float64))[0]
    values = torch.logspace(0, math.log10(least), 24, dtype=torch.float64) * torch.tensor([[1e-9], [1], [1e9]])
    matrix = sides[0] * values[:, None] @ sides[1]
    assert condition_by_products(matrix).tolist() == pytest.approx([1 / least] * 3, rel=1e-8)
    great = 1e25 * torch.diag(torch.tensor([1.0, 1e-3, 1e-12]))  # whose squares float32 does not hold
    assert float(condition_by_products(great)) == pytest.approx(1e12, rel=1e-6)
    lost = torch.tensor([1.0, 1e-200], dtype=torch.float64).diag()
    assert float(condition_by_products(lost)) == pytest.approx(1e200, rel=1e-6)
    matrix[1, :, 5] = 0
    assert condition_by_products(matrix)[1] == math.inf and condition_by_products(matrix)[0] < math.inf


@pytest.mark.parametrize("block, matrices", [(None, (2, 6)), (4, (3, 4)), (12, (1, 12)), (1, (12, 1))])
def test_online_affine_leaves_the_inverse_to_run_time(block: int | None, matrices: tuple[int, int]) -> None:
    """What folds and then its products make up the whole inverse; the mask has the width of a block."""
    factor = scrambled(partial(Affine, online=True, block=block))
    assert (
        factor.matrix.shape == (matrices[0], matrices[1], matrices[1]) and factor.mask.shape == factor.matrix[0].shape
    )
    diagonal = scrambled(Diagonal)
    both = Transform([diagonal, factor])(torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.equal(both.folded(x), diagonal(torch.float64).inverse(x))
    (tensors,) = both.online
    product = type(factor.operation())(**tensors)
    assert torch.equal(product(both.folded(x)), both.inverse(x)) and not torch.equal(both.folded(x), both.inverse(x))
    assert_close("x A⁻¹", x @ torch.linalg.inv(explicit(factor)), factor(torch.float64).inverse(x), 1e-12)
    assert {name: tensor.shape for name, tensor in factor.operation().named_parameters()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    assert product.multiply_adds(24) == 24 * matrices[1], "a shared block multiplies as often as it is used"


@pytest.mark.parametrize(
    "kinds", [(Shift,), (Shift, Diagonal), (Diagonal, Affine), (Shift, RopePair, Affine, Diagonal)]
)
def test_condition_of_a_product_is_the_true_one(kinds: tuple[type[Factor], ...]) -> None:
    product = Transform([scrambled(kind) for kind in kinds])
    matrix = product(torch.float64).transpose(torch.eye(12, dtype=torch.float64)).mT.detach()
    blocks = blocks_of(matrix)
    assert_close("A", torch.stack(blocks), product.explicit(), 1e-14)
    exact = max(float(torch.linalg.cond(block)) for block in blocks)
    assert float(product.condition()) == pytest.approx(exact, rel=1e-10)
    next(product.factors[-1].parameters()).data.flatten()[0] = torch.nan
    assert kinds == (Shift,) or not float(product.condition()) <= 1e300


def test_condition_of_factors_of_other_blocks_is_bounded() -> None:
    product = Transform([scrambled(Diagonal, SiteShape(1, 12)), scrambled(Affine)])
    matrix = product(torch.float64).transpose(torch.eye(12, dtype=torch.float64)).mT.detach()
    bound = float(product.condition())
    assert max(float(torch.linalg.cond(block)) for block in blocks_of(matrix)) < bound
    assert bound == pytest.approx(float(product.factors[0].condition() * product.factors[1].condition()))


def test_factors_act_on_activations_in_the_order_given() -> None:
    first, second = scrambled(Diagonal), scrambled(Affine)
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = x @ torch.linalg.inv(explicit(first)) @ torch.linalg.inv(explicit(second))
    assert_close("x A₁⁻¹ A₂⁻¹", expected, Transform([first, second])(torch.float64).inverse(x), 1e-12)
    assert relative_error(expected, Transform([second, first])(torch.float64).inverse(x)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_are_handed_out_in_the_precision_asked_for(dtype: torch.dtype) -> None:
    for kind in FACTORS:
        factor, x = scrambled(kind), torch.randn(2, 12, dtype=dtype)
        assert factor(dtype).inverse(x).dtype == factor(dtype).transpose(x).dtype == dtype
        assert {parameter.dtype for parameter in factor.parameters()} == {torch.float64}


@pytest.mark.parametrize("direction", ["inverse", "transpose"])
@pytest.mark.parametrize("kind", FACTORS)
def test_gradients(kind: type[Factor], direction: str) -> None:
    """Of the output in the input and in every parameter, against finite differences."""
    factor = scrambled(kind)

    def through(x: Tensor, *_: Tensor) -> Tensor:
        return getattr(factor(torch.float64), direction)(x)  # gradcheck moves the parameters in place

    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(through, (x, *factor.parameters()))


def rotary(positions: int, size: int) -> tuple[Tensor, Tensor]:
    frequency = 100.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency).repeat(1, 2)[None]
    return angle.cos(), angle.sin()


def scores(q: Tensor, k: Tensor, shape: SiteShape, positions: int) -> Tensor:
    """q·k after HF's rotary embedding: (heads, positions, positions); grouped queries."""
    heads = [x.view(1, positions, -1, shape.size).transpose(1, 2) for x in (q, k)]
    q, k = apply_rotary_pos_emb(*heads, *rotary(positions, shape.size if shape.rotary is None else shape.rotary))
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT


@pytest.mark.parametrize("turned", [None, 4, 2])
@pytest.mark.parametrize("kind", [RopePair, PairScale])
@pytest.mark.parametrize("group", [1, 3])
def test_rotary_pairs_commute_with_rotary_embedding(group: int, kind: type[Factor], turned: int | None) -> None:
    """On whole heads and where it turns only the first channels of each."""
    shape = SiteShape(2, 6, turned)
    q = torch.randn(7, 12 * group, dtype=torch.float64)
    k = torch.randn(7, 12, dtype=torch.float64)
    expected = scores(q, k, shape, 7)
    both = scrambled(kind, shape)(torch.float64)
    assert_close("q·k", expected, scores(both.inverse(q), both.transpose(k), shape, 7), 1e-12)
    assert relative_error(expected, scores(both.inverse(q), k, shape, 7)) > 0.05


def test_pair_scale_is_a_rope_pair_without_angles() -> None:
    shape = SiteShape(2, 6, 4)
    scale, pair = scrambled(PairScale, shape), RopePair(shape)
    pair.log_radius.data.copy_(scale.log_radius)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert_close("inverse", pair(torch.float64).inverse(x), scale(torch.float64).inverse(x), 1e-14)
    assert pair.condition() == scale.condition()


@pytest.mark.parametrize("kind", [Diagonal, Affine])
def test_other_factors_do_not_commute(kind: type[Factor]) -> None:
    """Negative control, and the reason why the query–key site refuses them."""
    q, k = torch.randn(2, 7, 12, dtype=torch.float64)
    both = scrambled(kind)(torch.float64)
    expected = scores(q, k, SHAPE, 7)
    assert relative_error(expected, scores(both.inverse(q), both.transpose(k), SHAPE, 7)) > 1e-2


def statistics() -> SiteStatistics:
    low, high = -torch.rand(2, 6, dtype=torch.float64) * 3, torch.rand(2, 6, dtype=torch.float64)
    return SiteStatistics(low, high, (low + high) / 3, high - low, torch.rand(2, 6, dtype=torch.float64) + 0.1)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_diagonal_starts_at_smoothquant(alpha: float) -> None:
    seen, factor = statistics(), Diagonal(SHAPE, alpha)
    factor.initialize(seen)
    greatest = torch.maximum(seen.low.abs(), seen.high.abs())
    assert_close("s", greatest**alpha / seen.weight_max ** (1 - alpha), factor.log_scale.exp(), 1e-12)


def test_dead_channels_have_finite_scales() -> None:
    zeros = torch.zeros(2, 6, dtype=torch.float64)
    for seen in (SiteStatistics(*4 * [zeros], zeros + 1), SiteStatistics(zeros - 1, *4 * [zeros])):
        factor = Diagonal(SHAPE)
        factor.initialize(seen)
        assert factor.log_scale.isfinite().all()


@pytest.mark.parametrize("start", ["zero", "mean", "middle"])
def test_shift_starts(start: str) -> None:
    seen, factor = statistics(), Shift(SHAPE, start)
    factor.initialize(seen)
    expected = {"zero": torch.zeros(2, 6), "mean": seen.mean, "middle": (seen.low + seen.high) / 2}[start]
    assert torch.equal(factor.delta, expected)
    shift = factor(torch.float64).shift(36)
    assert torch.equal(shift.view(2, 3, 6), factor.delta[:, None].expand(2, 3, 6))


def test_bad_requests() -> None:
    with pytest.raises(RequestError, match=r"alpha lies in \[0, 1\], got 1.5"):
        Diagonal(SHAPE, 1.5)
    with pytest.raises(RequestError, match="even number of turned channels, got 7 of a head of 7"):
        RopePair(SiteShape(2, 7))
    with pytest.raises(RequestError, match="got 3 of a head of 8"):
        PairScale(SiteShape(2, 8, rotary=3))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 24),
    blocks=st.integers(1, 3),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    stability=st.sampled_from([1.0, 0.1, 1e-3]),
    dominance=st.sampled_from([0.1, 0.9, 0.999]),
    epoch=st.integers(0, 3),
)
def test_projection_keeps_rows_dominant(size, blocks, scale, stability, dominance, epoch) -> None:
    """Whatever a step did to the matrix, its diagonal turned negative included, Levy–Desplanques holds after it."""
    affine = Affine(SiteShape(blocks, size), stability, dominance)
    affine.open_band(epoch, 4)
    with torch.no_grad():
        affine.matrix += scale * torch.randn_like(affine.matrix)
    before = affine.effective().detach().clone()
    bound = affine.project()
    assert_close("bound", affine.bound(), bound, 1e-12)
    matrix = affine.effective().detach()
    assert float(affine.margin()) >= 1 - dominance - 1e-12
    identity = torch.eye(size, dtype=torch.float64).expand_as(matrix)
    assert_close("inverse", identity, matrix @ torch.linalg.inv(matrix), 1e-9)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    varah = 1 / ((1 - dominance) * diagonal.min())
    assert float(torch.linalg.matrix_norm(torch.linalg.inv(matrix), float("inf")).max()) <= varah * (1 + 1e-9)
    kept = before.abs().sum(-1) - before.diagonal(dim1=-2, dim2=-1).abs() <= dominance * diagonal
    kept &= before.diagonal(dim1=-2, dim2=-1) >= 1e-3
    assert torch.equal(matrix[kept], before[kept]), "dominant rows are left alone"
    twice = matrix.clone()
    affine.project()
    assert_close("projection of a projection", twice, affine.effective().detach(), 1e-15)


@settings(max_examples=80, deadline=None)
@given(
    blocks=st.integers(1, 4),
    size=st.integers(1, 17),
    group=st.integers(1, 3),
    plan=st.integers(1, 7).flatmap(lambda epochs: st.tuples(st.integers(0, epochs - 1), st.just(epochs))),
    schedule=st.sampled_from(["exact", "paper", "none"]),
    stability=st.sampled_from([1.0, 0.1, 1e-3]),
    method=st.sampled_from(["lu", "newton", "pivoted"]),
    seed=st.integers(0, 99),
)
def test_any_mask_on_any_heads_is_exact(blocks, size, group, plan, schedule, stability, method, seed) -> None:
    """After a wild step and the projection: nothing beyond the band, both directions exact, the bounds true."""
    torch.manual_seed(seed)
    affine = Affine(SiteShape(blocks, size), stability, inverse=method)
    affine.open_band(*plan, schedule)
    with torch.no_grad():
        affine.matrix += torch.randn_like(affine.matrix)
    affine.project()
    matrix, width = affine.effective().detach(), band_width(*plan, size, schedule)
    index = torch.arange(size)
    assert not matrix[:, (index[:, None] - index).abs() > width].any()
    full = torch.block_diag(*(each for each in matrix for _ in range(group)))
    x = torch.randn(3, blocks * group * size, dtype=torch.float64)
    both = affine(torch.float64)
    exact = 1e-7 if method == "newton" else 1e-10  # it stops at a residual of 1e-9, which the condition magnifies
    assert_close("x A⁻¹", x @ torch.linalg.inv(full), both.inverse(x), exact)
    assert_close("w Aᵀ", x @ full.mT, both.transpose(x), 1e-13)
    condition = torch.linalg.cond(matrix, float("inf")).max()
    assert float(condition) <= float(affine.bound()) * (1 + 1e-9) < float("inf")
    assert float(affine.residual) <= 1e-9 and (width == 0) == (float(affine.margin()) == 1)


def test_without_dominance_there_is_no_bound() -> None:
    affine = Affine(SiteShape(2, 3), 1.0, None)
    affine.open_band(0, 1)
    assert float(affine.bound()) == 1
    affine.matrix.data[1, 0] = torch.tensor([1.0, 1.0, 0.5])
    assert float(affine.bound()) == float("inf")


def test_without_dominance_nothing_is_projected() -> None:
    affine = Affine(SiteShape(2, 8), 1.0, None)
    affine.open_band(0, 1)
    affine.matrix.data += torch.randn_like(affine.matrix)
    before = affine.matrix.detach().clone()
    affine.project()
    assert torch.equal(before, affine.matrix) and float(affine.margin()) < 0
