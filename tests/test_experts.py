"""Experts run here answer as transformers' own, and show what each of them reads."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close, relative_error
from tiny import avoided_expert, called, tiny, true_softmax
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from aq_lightning.calibration import BlockCalibration, Position, attach, merge, observed
from aq_lightning.calibration.call import answer
from aq_lightning.calibration.compiled import answer_plainly
from aq_lightning.calibration.observe import initialize
from aq_lightning.errors import RequestError
from aq_lightning.experts import experts_of, hooked, run_here, stacks
from aq_lightning.models.sites import Site
from aq_lightning.objectives import BlockMSE
from aq_lightning.quantizers import LearnedClipping, quantize_tokens, quantized_activations
from aq_lightning.scheme import Grid, Scheme
from aq_lightning.transforms import Diagonal

NAMES = ["mixtral", "qwen3_moe", "qwen3_moe-biased"]
Routed = dict[int, Tensor]


def routed(experts: nn.Module, hidden: Tensor, chosen: Tensor) -> Routed:
    """Activation inside every expert that has tokens, (tokens, width), from the plain formula."""
    inner = {}
    for expert in chosen.unique().tolist():
        x = hidden[(chosen == expert).any(1)]
        gate, up = linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        inner[expert] = silu(gate) * up
    return inner


def inputs(experts: nn.Module, tokens: int = 40, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, choices that leave out the last expert, and weights."""
    dtype = experts.down_proj.dtype
    chosen = torch.rand(tokens, experts.num_experts - 1).argsort(1)[:, :k]
    return torch.randn(tokens, 64, dtype=dtype), chosen, torch.rand(tokens, k, dtype=dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype, ratio", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", NAMES)
def test_answers_as_transformers(name: str, dtype: torch.dtype, ratio: float) -> None:
    model = tiny(name, dtype)
    (experts,) = experts_of(model.blocks[0])
    values = inputs(experts)
    ours = experts(*values)
    for other in ["eager"] + ["grouped_mm", "batched_mm"] * (dtype == torch.float32):
        model.model.config._experts_implementation = other
        assert_close(other, experts(*values), ours, ratio)


def test_gradient_is_transformers() -> None:
    """Of input, weights and routing; an expert without tokens gets zeros."""
    model = tiny("mixtral").model
    (experts,) = experts_of(model.model.layers[0])
    experts.requires_grad_(True)
    hidden, chosen, weights = inputs(experts)
    leaves = [hidden.requires_grad_(), weights.requires_grad_(), experts.gate_up_proj, experts.down_proj]
    target = torch.randn_like(hidden)
    gradients = []
    for name in ("aq_lightning", "eager"):
        model.config._experts_implementation = name
        gradients.append(torch.autograd.grad((experts(hidden, chosen, weights) * target).sum(), leaves))
    for ours, theirs in zip(*gradients, strict=True):
        assert_close("gradient", theirs, ours, 1e-14)
    assert not gradients[0][2][-1].any() and gradients[0][2][0].any()


@torch.no_grad()
def test_hooks_see_and_replace_what_the_last_linear_reads() -> None:
    (experts,) = experts_of(tiny("mixtral").blocks[0])
    values = inputs(experts)
    seen: Routed = {}

    def look(expert: int, inner: Tensor) -> Tensor:
        seen[expert] = inner
        return inner

    def double(_: int, inner: Tensor) -> Tensor:
        return 2 * inner

    plain = experts(*values)
    with hooked(experts, look):
        assert torch.equal(experts(*values), plain)
        with hooked(experts, double):
            assert torch.equal(experts(*values), 2 * plain)
        assert torch.equal(experts(*values), plain)
    expected = routed(experts, *values[:2])
    assert seen.keys() == expected.keys() == {0, 1, 2}, "none for the expert without tokens"
    for expert, inner in expected.items():
        assert_close(f"expert {expert}", inner, seen[expert], 1e-14)
    seen.clear()
    experts(*values)
    assert not seen


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("mixtral", torch.float32).model
    (experts,) = experts_of(model.model.layers[0])
    model.config._experts_implementation = "grouped_mm"
    with pytest.raises(ZeroDivisionError), hooked(experts, lambda *_: 1 / 0):
        experts(*inputs(experts))
    assert model.config._experts_implementation == "grouped_mm"
    assert "forward" not in vars(experts) and not experts._forward_pre_hooks
    run_here(model.config)
    assert "aq_lightning" not in str(model.config.to_dict())
    gone = weakref.ref(experts)
    del model, experts
    gc.collect()
    assert gone() is None, "hooks keep no module alive"


@pytest.mark.parametrize("trait, value", [("has_bias", True), ("is_transposed", True), ("has_gate", False)])
def test_experts_of_another_layout_are_refused(trait: str, value: bool) -> None:
    (experts,) = experts_of(tiny("mixtral").blocks[0])
    setattr(experts, trait, value)
    with pytest.raises(RequestError, match="gated linears .* got MixtralExperts"):
        experts(*inputs(experts))


def test_dense_blocks_have_no_experts() -> None:
    """Nor is any other parameter of three dimensions one of theirs."""
    block = tiny("qwen3").blocks[0]
    block.mlp.up_proj.extra = nn.Parameter(torch.zeros(2, 3, 4))
    assert not experts_of(block) and not stacks(block)
    block = tiny("mixtral").blocks[0]
    block.mlp.gate.extra = nn.Parameter(torch.zeros(2, 3, 4))
    assert experts_of(block) == [block.mlp.experts] == experts_of(block.mlp.experts)
    assert list(stacks(block)) == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert list(stacks(block.mlp.experts)) == ["gate_up_proj", "down_proj"]


@torch.no_grad()
def test_ranges_are_those_of_the_tokens_routed_to_an_expert() -> None:
    model = tiny("mixtral")
    block, call = model.blocks[0], called(model)
    routings: list[tuple[Tensor, Tensor]] = []
    with (
        observed([block], model.architecture.sites) as (site,),
        block.mlp.gate.register_forward_hook(lambda _, inputs, output: routings.append((inputs[0], output[2]))),
    ):
        answer(block, call.hidden, call.others)
    ((hidden, chosen),) = routings  # (tokens, hidden), (tokens, k)
    assert torch.equal(site["mlp_input"][0].low, hidden.amin(0)) and site["mlp_input"][0].tokens == len(hidden)
    inner = routed(block.mlp.experts, hidden, chosen)
    assert [one.tokens for one in site["mlp_hidden"]] == [int((chosen == expert).sum()) for expert in range(4)]
    for expert, x in inner.items():
        assert_close("low", x.amin(0), site["mlp_hidden"][expert].low, 1e-13)
        assert_close("high", x.amax(0), site["mlp_hidden"][expert].high, 1e-13)
        assert_close("mean", x.mean(0), site["mlp_hidden"][expert].total / len(x), 1e-13)


def test_expert_without_tokens_starts_from_its_weights_and_stays() -> None:
    """Its scales are finite, its gradients 0, its weights rounded; those of the others move."""
    model = tiny("mixtral", torch.float32, num_local_experts=5)
    avoided_expert(model.model)
    block, call = model.blocks[0], called(model)
    with torch.no_grad(), observed([block], model.architecture.sites) as (seen,):
        answer(block, call.hidden, call.others)
    assert [one.tokens > 0 for one in seen["mlp_hidden"]] == [False, True, True, True, True]
    transforms, scheme = {"mlp_hidden": [Diagonal], "mlp_input": [Diagonal]}, Scheme.parse("w3a16g8")
    attached = attach(block, model.architecture, model.heads, transforms, LearnedClipping, scheme, torch.float16)
    initialize(attached, seen)
    diagonal = attached.transforms["mlp_hidden"].factors[0]
    weight = block.mlp.experts.down_proj[0].abs().amax(0).double()  # (width)
    assert_close("scale", weight**-0.5, diagonal.log_scale[0].exp(), 1e-6)
    attached(call.hidden, **call.others).square().mean().backward()
    gradient = diagonal.log_scale.grad  # (experts, width)
    assert not gradient[0].any() and gradient[1:].any(1).all()
    assert all(p.grad.isfinite().all() for p in attached.parameters() if p.requires_grad)
    merged = merge(attached, torch.float16)
    assert all(merged[name].scale.isfinite().all() for name in stacks(block))
    assert relative_error(call.answer, answer(block, call.hidden, call.others)) < 0.5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the compiler itself
def test_compiled_steps_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where another order of sums rounds nothing differently; experts stay outside the compiled code."""
    torch._dynamo.reset()
    compiled_answer = torch.compile(answer_plainly, backend="aot_eager")
    monkeypatch.setattr("aq_lightning.calibration.block.compiled_answer", lambda: compiled_answer)
    model, transforms = tiny("mixtral"), {"mlp_hidden": [Diagonal], "mlp_input": [Diagonal]}
    block, call = model.blocks[0], called(model)
    scheme, gradients = Scheme.parse("w3a8g8"), []
    with quantized_activations([block], scheme.activation):
        for compiled in (False, True):
            attached = attach(
                block, model.architecture, model.heads, transforms, LearnedClipping, scheme, torch.float16
            )
            recipe = SimpleNamespace(objective=BlockMSE(), compiled=compiled)
            module = BlockCalibration([attached], [call.others], recipe, Position(0, 0, 1))
            recipe.objective.loss(module(call.hidden), call.hidden).backward()
            gradients.append([parameter.grad for parameter in module.parameters() if parameter.requires_grad])
    for plain, fast in zip(*gradients, strict=True):
        assert_close("gradient", plain, fast, 1e-7)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NAMES)
def test_experts_read_quantized_tokens_and_the_router_does_not(name: str, bits: int) -> None:
    model, grid = tiny(name), Grid(bits, symmetric=True)
    mlp = model.blocks[0].mlp
    hidden = torch.randn(1, 30, 64, dtype=torch.float64)
    with true_softmax():
        _, weights, chosen = mlp.gate(hidden[0])  # as without quantization
        with quantized_activations([mlp], grid):
            actual = mlp(hidden)
    expected = torch.zeros_like(hidden[0])
    rounded = quantize_tokens(hidden[0], grid)
    for expert, inner in routed(mlp.experts, rounded, chosen).items():
        token, place = (chosen == expert).nonzero(as_tuple=True)
        output = linear(quantize_tokens(inner, grid), mlp.experts.down_proj[expert])
        expected.index_add_(0, token, output * weights[token, place, None])
    assert_close("quantized", expected, actual[0], 1e-12)
    with true_softmax():
        assert relative_error(mlp(hidden), actual) > 1e-3, "rounding is seen, and gone afterwards"


def test_sites_inside_experts_say_so() -> None:
    """A weight of experts read by columns has the channels of all, each expert's its own."""
    weight = torch.randn(3, 5, 7)  # (experts, out, in)
    inside, before = Site("a", "p", ("c",), per_expert=True), Site("a", "p", ("c",))
    assert torch.equal(inside.columns(weight), torch.cat(list(weight), dim=1))
    assert torch.equal(inside.from_columns(inside.columns(weight), weight), weight)
    assert before.columns(weight) is weight is before.from_columns(weight, weight)
