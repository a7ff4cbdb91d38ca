"""The module that is fitted: its target, its batches, its optimizer, and the start of its transforms."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close, relative_error, tiny_llama, with_true_norms
from torch import Tensor

from aq_lightning.calibration import BlockCalibration, Pairs, Position, Share, attach, observed
from aq_lightning.calibration.observe import initialize
from aq_lightning.models.llama import SPEC
from aq_lightning.models.sites import Heads
from aq_lightning.objectives import BlockMSE, RelativeMSE
from aq_lightning.quantizers import LearnedClipping, quantized_activations
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import Affine, Diagonal, RopePair, Shift

HEADS = Heads(query=4, key_value=2, size=16, rotary=16)
TRANSFORMS = {
    "attention_input": [Shift, Diagonal],
    "query_key": [RopePair],
    "value_output": [Diagonal, Affine],
    "mlp_input": [Shift, Diagonal],
    "mlp_hidden": [Diagonal],
}


def gradient(loss: Tensor, y: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, y)
    return result


def test_merged_target_has_the_gradient_of_both_teachers() -> None:
    full, same = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    y = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    objective, plain = BlockMSE(same_input=True), BlockMSE()
    both = gradient(plain.loss(y, full) + plain.loss(y, same), y)
    target = objective.target(full, same)
    assert_close("gradient", both, gradient(objective.loss(y, target), y), 1e-14)
    assert not torch.allclose(both, gradient(plain.loss(y, target), y)), "the factor 2 matters"


@pytest.mark.parametrize("objective", [BlockMSE(), RelativeMSE()], ids=lambda o: type(o).__name__)
def test_without_the_second_teacher_the_target_is_the_first(objective) -> None:
    full = torch.randn(2, 3, 5)
    assert objective.target(full, None) is full and not objective.same_input
    assert objective.loss(full, full) == 0


def test_losses_by_hand() -> None:
    target = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    output = torch.tensor([[[3.0, 5.0], [2.0, 1.0]]])
    assert BlockMSE().loss(output, target) == pytest.approx((1 + 4) / 4)
    assert BlockMSE(same_input=True).loss(output, target) == pytest.approx(2 * (1 + 4) / 4)
    assert RelativeMSE().loss(output, target) == pytest.approx((1 / 25 + 4 / 1) / 2)


def test_half_precision_is_compared_in_float32() -> None:
    output, target = torch.full((1, 1, 4), 300.0).half(), torch.zeros(1, 1, 4).half()
    assert BlockMSE().loss(output, target) == 90000.0  # beyond float16


def test_batches_are_seeded_pairs() -> None:
    inputs, targets = torch.arange(10.0)[:, None, None], -torch.arange(10.0)[:, None, None]

    def order(seed: int) -> list[float]:
        seen = []
        for x, y, total in Pairs(inputs, targets, 4, seed):
            assert torch.equal(x, -y) and len(x) == total <= 4
            seen += x.flatten().tolist()
        return seen

    torch.manual_seed(1)
    first = order(3)
    torch.manual_seed(2)
    assert order(3) == first and sorted(first) == list(range(10))
    assert order(4) != first != sorted(first)


def test_batches_are_shuffled_anew_each_epoch() -> None:
    loader = Pairs(torch.arange(16.0)[:, None, None], torch.zeros(16, 1, 1), 4, 0)
    first, second = (next(iter(loader))[0].flatten().tolist() for _ in range(2))
    assert first != second


@pytest.mark.parametrize("samples, batch_size, ranks", [(10, 4, 2), (10, 4, 3), (7, 8, 3), (9, 3, 3), (5, 1, 1)])
def test_batches_do_not_depend_on_the_number_of_processes(samples: int, batch_size: int, ranks: int) -> None:
    """Each process has its own samples; together they see the batches of one process, in its order."""
    values = torch.arange(float(samples))[:, None, None]

    def epochs(rank: int, ranks: int) -> list[tuple[set[float], int]]:
        share = Share(samples, batch_size, rank, ranks)
        own = values[share.indices()]
        pairs = Pairs(own, own, batch_size, 3, share)
        return [(set(x.flatten().tolist()), total) for _ in range(2) for x, _, total in pairs]

    alone, parts = epochs(0, 1), [epochs(rank, ranks) for rank in range(ranks)]
    assert len(alone) == 2 * -(-samples // batch_size) and all(len(seen) == total for seen, total in alone)
    for (whole, total), *shares in zip(alone, *parts, strict=True):
        assert set().union(*(seen for seen, _ in shares)) == whole and {each for _, each in shares} == {total}
        assert sum(len(seen) for seen, _ in shares) == total


@torch.no_grad()
def test_transforms_start_from_what_is_observed() -> None:
    """SmoothQuant's scale and the mean, from the inputs of the linears and the weights of all consumers."""
    model = tiny_llama().double()
    block, hidden = model.model.layers[0], torch.randn(3, 16, 64, dtype=torch.float64)
    others = {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(16)[None])}
    recorded: list[Tensor] = []
    handle = block.mlp.gate_proj.register_forward_pre_hook(lambda _, args: recorded.append(args[0].flatten(0, 1)))
    with observed([block], SPEC.sites) as ranges:
        block(hidden[:1], **others), block(hidden[1:], **others)
    handle.remove()
    seen = torch.cat(recorded)  # (tokens, 64)
    transforms = {"mlp_input": [Shift, Diagonal], "value_output": [Diagonal]}
    attached = attach(block, SPEC, HEADS, transforms, None, Scheme.parse("w4a16"), torch.float32)
    initialize(attached, ranges[0])
    shift, diagonal = attached.transforms["mlp_input"].factors
    weight = torch.maximum(block.mlp.gate_proj.weight.abs().amax(0), block.mlp.up_proj.weight.abs().amax(0))
    assert_close("scale", (seen.abs().amax(0) / weight).sqrt()[None], diagonal.log_scale.exp(), 1e-12)
    assert_close("shift", seen.mean(0)[None], shift.delta, 1e-12)
    recorded.clear()
    block(hidden, **others)
    assert not recorded and not block.mlp.gate_proj._forward_pre_hooks, "hooks are gone"


ONLINE = {
    "attention_input": [Shift, Diagonal, partial(Affine, online=True)],
    "value_output": [Diagonal, Affine, partial(Affine, online=True, block=8)],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the compiler itself
@pytest.mark.parametrize("transforms", [TRANSFORMS, ONLINE], ids=["folding", "online"])
def test_compiled_steps_are_the_plain_ones_and_shared_between_blocks(transforms: dict) -> None:
    """One optimizer step of two blocks gives the same gradients compiled; the second block reuses the first's code."""
    torch._dynamo.utils.counters.clear()
    model = with_true_norms(tiny_llama().double())  # in float32 another order of sums would round a weight differently
    hidden = torch.randn(2, 16, 64, dtype=torch.float64)
    others = [{"position_embeddings": model.model.rotary_emb(hidden, torch.arange(16)[None])}]
    gradients: dict[bool, list[Tensor]] = {}
    for compiled in (False, True):
        recipe = SimpleNamespace(objective=BlockMSE(), compiled=compiled)
        gradients[compiled] = []
        for index, block in enumerate(model.model.layers):
            attached = attach(block, SPEC, HEADS, transforms, LearnedClipping, Scheme.parse("w3a16g32"), torch.float16)
            module = BlockCalibration([attached], others, recipe, Position(index, index, 2))
            for matrix in module.matrices():
                matrix.open_band(0, 1)
            recipe.objective.loss(module(hidden), hidden).backward()
            gradients[compiled] += [p.grad for p in module.parameters() if p.requires_grad]
    for plain, fast in zip(gradients[False], gradients[True], strict=True):
        assert_close("gradient", plain, fast, 1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_code_of_another_scheme_is_not_taken() -> None:
    """The same block without and then with quantized activations, whose hooks compiled code must see. An activation on
    an edge of its grid may fall to either side."""
    model = with_true_norms(tiny_llama().double())
    hidden = torch.randn(2, 16, 64, dtype=torch.float64)
    others = [{"position_embeddings": model.model.rotary_emb(hidden, torch.arange(16)[None])}]
    answers = []
    for name in ("w4a16", "w4a4"):
        scheme, block = Scheme.parse(name), model.model.layers[0]
        attached = attach(block, SPEC, HEADS, {}, LearnedClipping, scheme, torch.float16)
        with quantized_activations([block], scheme.activation):
            plain, fast = (
                BlockCalibration(
                    [attached], others, SimpleNamespace(objective=BlockMSE(), compiled=compiled), Position(0, 0, 1)
                )(hidden)
                for compiled in (False, True)
            )
        assert_close(name, plain, fast, 1e-9 if scheme.activation is None else 4e-3)
        answers.append(fast)
    assert relative_error(*answers) > 6e-3
