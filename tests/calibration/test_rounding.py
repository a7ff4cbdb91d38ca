"""What rounders are told of a weight's input is what decides the error of its output."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import assert_close, tiny_llama
from tiny import called, tiny
from torch import Tensor

from aq_lightning.calibration import attach, merge, observed
from aq_lightning.calibration.observe import initialize
from aq_lightning.calibration.rounding import FoldedBlock, Passes, choose_ranges, choose_scales, rounded
from aq_lightning.calibration.streams import Streams
from aq_lightning.errors import RequestError
from aq_lightning.models.llama import SPEC
from aq_lightning.models.sites import Heads, SiteShape
from aq_lightning.quantizers import GridSearch, LearnedClipping, MinMax, SearchedRange, quantized_activations
from aq_lightning.rounders import GPTQ, CoordinateDescent, Moments, Nearest, Rounder
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import ActivationAware, Affine, Diagonal, RopePair, Shift

HEADS = Heads(query=4, key_value=2, size=16, rotary=16)
FOLDING = {
    "attention_input": [Shift, Diagonal],
    "query_key": [RopePair],
    "value_output": [Shift, Diagonal, Affine],
    "mlp_input": [Shift, Diagonal],
    "mlp_hidden": [Diagonal],
}
ONLINE = {"mlp_input": [Shift, Diagonal, partial(Affine, online=True, block=16)]}
CPU = torch.device("cpu")


def folded_block(scheme: str, transforms: dict, quantizer=MinMax) -> tuple[FoldedBlock, Streams]:
    """The first block of a tiny model with random transforms, and both streams that enter it."""
    model = tiny_llama(attention_bias=True)
    attached = attach(model.model.layers[0], SPEC, HEADS, transforms, quantizer, Scheme.parse(scheme), torch.float16)
    for name, parameter in attached.named_parameters():
        if parameter.requires_grad:
            parameter.data += (0.3 if "matrix" not in name else 0.1) * torch.randn_like(parameter)
    for module in attached.modules():
        if isinstance(module, Affine):
            module.open_band(0, 1)
    hidden = torch.randn(3, 16, 64)
    others = {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(16)[None])}
    return FoldedBlock(attached, Passes(others, 2, CPU)), Streams(hidden, hidden + 0.1 * torch.randn_like(hidden))


def output(block: FoldedBlock, name: str, codes: dict, stream: Tensor) -> Tensor:
    """What one linear answers, (tokens, out)."""
    seen: list[Tensor] = []
    linear = block.attached.block.get_submodule(name.removesuffix(".weight"))
    hook = linear.register_forward_hook(lambda _, inputs, answer: seen.append(answer.flatten(0, -2)))
    block.passes.run(block.function(codes), stream)
    hook.remove()
    return torch.cat(seen).double()


def test_weights_that_read_the_same_are_read_together() -> None:
    block, streams = folded_block("w3a8", FOLDING)
    with quantized_activations([block.attached.block], Scheme.parse("w3a8").activation):
        groups = block.groups(streams.quantized)
    short = [[name.split(".")[1] for name in group] for group in groups]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@torch.no_grad()
@pytest.mark.parametrize("transforms", [{}, FOLDING, ONLINE], ids=["plain", "folding", "online"])
@pytest.mark.parametrize("scheme", ["w3a16g32", "w3a8"])
def test_the_second_moments_give_the_error_of_the_output(scheme: str, transforms: dict) -> None:
    """tr(R H Rᵀ) is what rounding one weight does to what its linear answers, biases of shifts included."""
    block, streams = folded_block(scheme, transforms)
    with quantized_activations([block.attached.block], Scheme.parse(scheme).activation):
        seen = block.moments(list(block.quantizers), {}, streams)
        for name, quantizer in block.quantizers.items():
            codes = {name: quantizer.quantize(block.folded[name])}
            off = output(block, name, codes, streams.quantized) - output(block, name, {}, streams.quantized)
            error = block.folded[name] - codes[name].dequantize(torch.float64)
            (moments,) = seen[name]
            expected = ((error @ moments.second) * error).sum()
            assert_close(name, off.square().sum(1).mean(), expected, 1e-3)


@torch.no_grad()
def test_asymmetry_gives_the_error_against_the_full_precision_model() -> None:
    """‖W x − Ŵ x̂‖² = tr(R H Rᵀ) + 2 tr(W D Rᵀ) + what does not depend on Ŵ, biases included."""
    block, streams = folded_block("w3a16g32", FOLDING)
    for name, quantizer in block.quantizers.items():
        (moments,) = block.moments([name], {}, streams, asymmetric=True)[name]
        weight = block.folded[name]
        codes = {name: quantizer.quantize(weight)}
        error = weight - codes[name].dequantize(torch.float64)
        target = output(block, name, {}, streams.full)

        def off(codes: dict, name: str = name, target: Tensor = target) -> Tensor:
            return (target - output(block, name, codes, streams.quantized)).square().sum(1).mean()

        change = ((error @ moments.second) * error).sum() + 2 * ((weight @ moments.asymmetry) * error).sum()
        assert_close(name, off(codes) - off({}), change, 2e-3)


class Recorder(Rounder):
    """Rounds to the nearest and remembers what it was told."""

    def __init__(self) -> None:
        self.seen: list[Moments] = []

    def round(self, weight: Tensor, start, moments: Moments):
        self.seen.append(moments)
        return start


@torch.no_grad()
def test_a_weight_is_rounded_for_what_the_rounded_ones_before_it_leave() -> None:
    block, streams = folded_block("w2a16g32", {})
    recorder = Recorder()
    codes = rounded(block.attached, recorder, block.passes, streams)
    assert list(codes) == [name for group in block.groups(streams.quantized) for name in group]
    before = {name: codes[name] for name in list(codes)[:4]}
    (expected,) = block.moments(["mlp.gate_proj.weight"], before, streams)["mlp.gate_proj.weight"]
    (unrounded,) = block.moments(["mlp.gate_proj.weight"], {}, streams)["mlp.gate_proj.weight"]
    assert_close("H", expected.second, recorder.seen[4].second, 1e-12)
    assert not torch.allclose(unrounded.second, expected.second, rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("rounder", [GPTQ(), GPTQ(asymmetry=0.25), CoordinateDescent(GPTQ())], ids=["GPTQ", "A", "CD"])
@pytest.mark.parametrize("transforms", [{}, FOLDING], ids=["plain", "folding"])
def test_a_rounder_lowers_the_error_of_a_block(rounder: Rounder, transforms: dict) -> None:
    block, streams = folded_block("w3a16g32", transforms, LearnedClipping)
    target = block.passes.run(block.attached.block, streams.full)

    def loss(codes: dict) -> float:
        return float((block.passes.run(block.function(codes), streams.quantized) - target).square().mean())

    nearest = rounded(block.attached, Nearest(), block.passes, streams)
    codes = rounded(block.attached, rounder, block.passes, streams)
    assert loss(codes) < loss(nearest)
    expected = block.passes.run(block.function(codes), streams.quantized)
    merged = merge(block.attached, torch.float16, codes=codes)
    assert all(merged[name] is codes[name] for name in codes)
    assert_close("merged", expected, block.passes.run(block.attached.block, streams.quantized), 2e-3)


@torch.no_grad()
@pytest.mark.parametrize("weighting", ["none", "diagonal", "full"])
def test_ranges_are_chosen_for_what_is_read(weighting: str) -> None:
    search = GridSearch(weighting, steps=20)
    block, streams = folded_block("w2a16g32", FOLDING, partial(SearchedRange, search=search))
    choose_ranges(block.attached, block.passes, streams.quantized)
    for name, quantizer in block.quantizers.items():
        (moments,) = block.moments([name], {}, streams)[name]
        low, high = search(block.folded[name].view(quantizer.grouped), moments.second, quantizer.grid, torch.float16)
        assert_close("low", low, quantizer.low, 1e-6)
        assert_close("high", high, quantizer.high, 1e-6)
        assert float(quantizer.high.min()) < 1


@torch.no_grad()
def test_trained_ranges_are_left_alone_and_searched_ones_follow_the_weight() -> None:
    for kind, follows in ((LearnedClipping, False), (SearchedRange, True)):
        block, streams = folded_block("w2a16g32", FOLDING, partial(kind, search=GridSearch(steps=20)))
        before = {name: [each.clone() for each in q.fractions()] for name, q in block.quantizers.items()}
        codes = rounded(block.attached, Nearest(), block.passes, streams)
        for name, quantizer in block.quantizers.items():
            own = quantizer.quantize(block.folded[name])
            assert torch.equal(own.scale, codes[name].scale) != follows
            assert all(map(torch.equal, before[name], quantizer.fractions())), "the quantizer itself stays"


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_rounded_each_for_its_own_tokens(name: str) -> None:
    model = tiny(name, torch.float32)
    call = called(model, tokens=torch.randint(3, 96, (1, 64)))
    scheme, transforms = Scheme.parse("w3a16g16"), {"mlp_input": [Diagonal], "mlp_hidden": [Diagonal]}
    attached = attach(model.blocks[0], model.architecture, model.heads, transforms, MinMax, scheme, torch.float16)
    block = FoldedBlock(attached, Passes({**call.others, "use_cache": False}, 2, CPU))
    streams = Streams(call.hidden, call.hidden)
    recorder, order = Recorder(), [name for group in block.groups(call.hidden) for name in group]
    nearest = rounded(attached, recorder, block.passes, streams)
    assert order[-2:] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    experts = block.folded[order[-1]].shape[0]
    assert len(recorder.seen) == len(order) - 2 + 2 * experts
    traces = torch.stack([each.second.trace() for each in recorder.seen[-2 * experts :]])
    assert len(set(traces.tolist())) == 2 * experts, "no two see the same"
    codes = rounded(attached, GPTQ(), block.passes, streams)

    def loss(codes: dict) -> float:
        return float((block.passes.run(block.function(codes), call.hidden) - call.answer).square().mean())

    only = {key: codes[key] if key in order[-2:] else nearest[key] for key in order}
    assert loss(codes) < loss(nearest) and loss(only) < loss(nearest)


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention_input", "value_output", "mlp_input", "mlp_hidden"])
def test_activation_aware_scales_are_awqs(name: str) -> None:
    """Of its 20 candidates, made from mean |x| by the formula, the one whose linears answer best after rounding."""
    site = next(site for site in SPEC.sites if site.name == name)
    block, streams = folded_block("w2a16g32", {name: [ActivationAware]})
    attached, stream = block.attached, streams.quantized
    attached.transforms[name].factors[0].diagonal.log_scale.data.zero_()
    recorded: list[Tensor] = []
    hook = attached.block.get_submodule(site.consumers[0]).register_forward_pre_hook(
        lambda _, inputs: recorded.append(inputs[0].flatten(0, 1))
    )
    with observed([attached.block], SPEC.sites) as ranges:
        block.passes.run(attached.block, stream)
    hook.remove()
    initialize(attached, ranges[0])
    choose_scales(attached, block.passes, stream)

    x, heads = torch.cat(recorded).double(), HEADS.key_value if site.per_head else 1
    magnitude = x.abs().mean(0).unflatten(0, (heads, -1))  # (heads, group · size): a group shares its scale
    magnitude = magnitude.unflatten(1, (-1, 16 if site.per_head else x.shape[1])).mean(1)
    weights = [attached.block.get_submodule(consumer).weight.double() for consumer in site.consumers]
    candidates, errors = [], []
    for exponent in range(20):
        scale = (magnitude ** (exponent / 20)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        wide = scale[:, None].expand(-1, x.shape[1] // scale.numel(), -1).flatten()  # (channels)
        rounded = [MinMax(Scheme.parse("w2a16g32").weight, w.shape, torch.float16)(w * wide) / wide for w in weights]
        candidates.append(scale)
        errors.append(sum(float((x @ (w - r).T).square().sum()) for w, r in zip(weights, rounded, strict=True)))
    assert min(errors) < 0.99 * errors[0], "some scale must help"
    found = attached.transforms[name].factors[0].diagonal.log_scale.exp()
    assert_close("scale", candidates[errors.index(min(errors))], found, 1e-9)


def test_activation_aware_needs_a_candidate() -> None:
    with pytest.raises(RequestError, match="1 or more, got 0"):
        ActivationAware(SiteShape(1, 4), steps=0)
