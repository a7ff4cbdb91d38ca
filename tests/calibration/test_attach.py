"""What training sees is what the checkpoint will hold, and a detached block is what it was."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import assert_close, tiny_llama
from torch import Tensor

from aq_lightning.calibration import AttachedBlock, adapt, attach, merge
from aq_lightning.calibration.attach import gained_biases, install, site_shape
from aq_lightning.errors import RequestError
from aq_lightning.kernels import fake_quantize
from aq_lightning.models.llama import SPEC
from aq_lightning.models.sites import Heads, SiteShape
from aq_lightning.qtensor import QTensor
from aq_lightning.quantizers import LearnedClipping, LearnedRounding, MinMax, quantized_activations
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import AcrossHeads, Affine, Clip, Dense, Diagonal, Kronecker, RopePair, Shift
from aq_lightning.transforms.online import carried, carrier

HEADS = Heads(query=4, key_value=2, size=16, rotary=16)
EVERYTHING = {
    "attention_input": [Shift, Diagonal],
    "query_key": [RopePair],
    "value_output": [Diagonal, Affine],
    "mlp_input": [Shift, Diagonal],
    "mlp_hidden": [Diagonal],
}
SCHEMES = ["w4a16", "w3a16g32", "w4a4", "w4a16g32sym", "w2a16g16", "w8a8"]


def attached_block(
    scheme: str, storage: torch.dtype = torch.float16, transforms=EVERYTHING, quantizer=LearnedClipping
) -> AttachedBlock:
    """With random parameters, far from where they start."""
    block = tiny_llama().model.layers[0]
    attached = attach(block, SPEC, HEADS, transforms, quantizer, Scheme.parse(scheme), storage)
    for name, parameter in attached.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter)
            parameter.data += 0.3 * noise if "matrix" not in name else noise / noise.shape[-1] ** 0.5
    for module in attached.modules():
        if isinstance(module, Affine):
            module.open_band(0, 1)
    return attached


def inputs() -> tuple[Tensor, dict]:
    hidden = torch.randn(2, 16, 64)
    return hidden, {"position_embeddings": tiny_llama().model.rotary_emb(hidden, torch.arange(16)[None])}


@pytest.mark.parametrize("scheme", ["w4a16", "w3a16g32", "w4a4", "w4a8g16sym"])
@pytest.mark.parametrize("quantizer", [LearnedClipping, LearnedRounding])
def test_the_kernel_gives_what_the_plain_path_gives(scheme: str, quantizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the block and every gradient, in float32; a weight on an edge of the grid may fall either way."""
    attached = attached_block(scheme, quantizer=quantizer)
    cotangents = {name: torch.randn_like(tensor) for name, tensor in attached.effective(torch.float32).items()}
    parameters = [parameter for parameter in attached.parameters() if parameter.requires_grad]
    found = []
    for path in (fake_quantize.naive.fake_quantize, fake_quantize.fused):
        monkeypatch.setattr(sys.modules[AttachedBlock.__module__], "fake_quantize", path)
        tensors = attached.effective(torch.float32)
        loss = sum((tensors[name] * cotangent).sum() for name, cotangent in cotangents.items())
        found.append((tensors, torch.autograd.grad(loss, parameters)))
    (plain, wanted), (fused, got) = found
    for name, tensor in plain.items():
        assert_close(name, tensor, fused[name], 1e-2)
        assert ((tensor - fused[name]).abs() > 1e-5 * tensor.abs().max()).float().mean() < 1e-2, name
    for tensor, other in zip(wanted, got, strict=True):
        assert_close("gradient", tensor, other, 3e-2)


@torch.no_grad()
@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_sees_the_merged_weights(scheme: str, storage: torch.dtype) -> None:
    """Exactly, for every weight that is rounded; all others to the storage dtype."""
    attached = attached_block(scheme, storage)
    trained = attached.effective(torch.float64)
    original = dict(tiny_llama().model.layers[0].named_parameters())
    merged = merge(attached, storage)
    assert sum(isinstance(tensor, QTensor) for tensor in merged.values()) == 7
    for name, tensor in trained.items():
        if isinstance(merged[name], QTensor):
            assert torch.equal(merged[name].dequantize(torch.float64), tensor), name
            assert not torch.equal(tensor, original[name].double()), f"{name} was rounded"
        else:
            assert torch.equal(merged[name], tensor.to(storage)), name


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_block_answers_after_merge_as_before(scheme: str) -> None:
    """Float32 against float64 maps: equal but for rare roundings that fall the other way."""
    hidden, others = inputs()
    attached = attached_block(scheme, torch.float32)
    with quantized_activations([attached.block], Scheme.parse(scheme).activation):
        before = attached(hidden, **others)
        merge(attached, torch.float32)
        assert_close("merged", before, attached.block(hidden, **others), 0.02)


@torch.no_grad()
def test_snapshot_is_the_merged_block() -> None:
    """To the last bit: what is chosen by its snapshot's loss is what is written."""
    hidden, others = inputs()
    attached = attached_block("w3a16g32", torch.float32)
    frozen = attached.snapshot()
    expected = frozen(hidden, **others)
    for parameter in attached.transforms.parameters():
        parameter.data += 0.1
    assert torch.equal(frozen(hidden, **others), expected), "later changes do not show"
    assert not torch.equal(attached.snapshot()(hidden, **others), expected)
    for parameter in attached.transforms.parameters():
        parameter.data -= 0.1
    frozen = attached.snapshot()(hidden, **others)
    merge(attached, torch.float32)
    assert torch.equal(attached.block(hidden, **others), frozen)


@torch.no_grad()
def test_block_is_untouched_until_it_is_merged() -> None:
    hidden, others = inputs()
    attached, plain = attached_block("w3a16g32"), tiny_llama().model.layers[0]
    attached(hidden, **others)
    assert type(attached.block) is type(plain)
    assert {name: type(module) for name, module in attached.block.named_modules()} == {
        name: type(module) for name, module in plain.named_modules()
    }
    state = attached.block.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    assert torch.equal(attached.block(hidden, **others), plain(hidden, **others))


@pytest.mark.parametrize(
    "transforms, scheme, gained",
    [
        ({}, "w4a16", set()),
        ({"mlp_input": [Diagonal], "query_key": [RopePair]}, "w4a4", set()),
        ({"mlp_input": [Shift]}, "w4a16", {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        ({"value_output": [Shift]}, "w4a4", {f"self_attn.{x}_proj" for x in "qkvo"}),
    ],
)
def test_merged_block_has_the_original_keys_and_the_biases_of_shifts(transforms, scheme, gained) -> None:
    """One switch of the config gives all its linears a bias; zeros where no shift asked for one."""
    attached = attached_block(scheme, transforms=transforms)
    assert gained_biases(attached) <= gained
    merge(attached, torch.float16)
    expected = tiny_llama().model.layers[0].state_dict().keys() | {f"{name}.bias" for name in gained}
    assert attached.block.state_dict().keys() == expected
    assert not any(parameter.requires_grad for parameter in attached.block.parameters())


@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
def test_gradient_reaches_every_trainable_parameter_and_no_other(scheme: str) -> None:
    hidden, others = inputs()
    attached = attached_block(scheme)
    with quantized_activations([attached.block], Scheme.parse(scheme).activation):
        attached(hidden, **others).square().mean().backward()
    for name, parameter in attached.named_parameters():
        if name.startswith("block."):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_float64_parameters_stay_float64() -> None:
    attached = attached_block("w4a16")
    assert {parameter.dtype for parameter in attached.transforms.parameters()} == {torch.float64}


def test_attach_on_the_meta_device() -> None:
    block = tiny_llama().model.layers[0].to("meta")
    attached = attach(block, SPEC, HEADS, EVERYTHING, LearnedClipping, Scheme.parse("w3a16g32"), torch.float16)
    assert all(parameter.is_meta for parameter in attached.parameters())
    with pytest.raises(RequestError, match="got 48"):
        attach(block, SPEC, HEADS, {}, MinMax, Scheme.parse("w3a16g48"), torch.float16)


@pytest.mark.parametrize("kv_heads, shape", [(1, (1, 16)), (2, (2, 16)), (4, (4, 16))])
def test_sites_have_the_shape_of_the_key_value_heads(kv_heads: int, shape: tuple[int, int]) -> None:
    block = tiny_llama(num_key_value_heads=kv_heads).model.layers[0]
    heads = replace(HEADS, key_value=kv_heads)
    shapes = {site.name: site_shape(block, site, heads) for site in SPEC.sites}
    assert shapes["query_key"] == SiteShape(*shape, rotary=16, dual=True)
    assert shapes["value_output"] == SiteShape(*shape, group=4 // kv_heads)
    assert shapes["attention_input"] == SiteShape(1, 64) and shapes["mlp_hidden"] == SiteShape(1, 128)


DENSE = partial(Affine, online=True)
ONLINE = {
    "attention_input": [Shift, Diagonal, DENSE],
    "value_output": [Diagonal, Affine, partial(DENSE, block=8)],
    "mlp_input": [partial(DENSE, block=32), DENSE],
    "mlp_hidden": [partial(DENSE, block=32)],
}
PRODUCTS = {
    "input_layernorm.online.0.inverse": (1, 64, 64),
    "self_attn.o_proj.online.0.inverse": (4, 8, 8),
    "post_attention_layernorm.online.0.inverse": (2, 32, 32),
    "post_attention_layernorm.online.1.inverse": (1, 64, 64),
    "mlp.down_proj.online.0.inverse": (4, 32, 32),
}


def state(block: torch.nn.Module) -> tuple:
    """All that a block is made of, its hooks included."""
    modules = [
        (name, type(module), *module._forward_hooks.values(), *module._forward_pre_hooks.values())
        for name, module in block.named_modules()
    ]
    return modules, list(block.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_online_products_are_merged_as_trained(scheme: str) -> None:
    """Exactly, as every other tensor; and they are what multiplies in the merged block."""
    hidden, others = inputs()
    attached = attached_block(scheme, torch.float32, ONLINE)
    frozen = attached.snapshot()
    with quantized_activations([attached.block], Scheme.parse(scheme).activation):
        expected = frozen(hidden, **others)
        training = attached(hidden, **others)
        merged = merge(attached, torch.float32)
        assert {name: tuple(merged[name].shape) for name in merged if carrier(name)} == PRODUCTS
        assert torch.equal(attached.block(hidden, **others), expected)
        assert_close("training", expected, training, 0.02)
        stripped = {name: tensor for name, tensor in merged.items() if not carrier(name)}
        install(attached.block, merged)
        assert torch.equal(attached.block(hidden, **others), expected)
        install(attached.block, stripped)
        assert not torch.equal(attached.block(hidden, **others), expected), "the products matter"
        assert not list(carried(attached.block))


@torch.no_grad()
def test_activations_are_quantized_behind_the_online_product() -> None:
    """Whether the quantizer's hook or the product's was there first."""
    hidden, others = inputs()
    seen: list[Tensor] = []
    transforms = {"value_output": [partial(DENSE, block=8)], "attention_input": [DENSE]}
    grid = Scheme.parse("w4a4").activation
    for attach_first in (True, False):
        block = tiny_llama().model.layers[0]
        first = attach(
            block, SPEC, HEADS, transforms if attach_first else {}, None, Scheme.parse("w4a4"), torch.float32
        )
        with quantized_activations([first.block], grid):
            attached = attach(block, SPEC, HEADS, transforms, None, Scheme.parse("w4a4"), torch.float32)
            for number, factor in enumerate(part for part in attached.modules() if isinstance(part, Affine)):
                factor.matrix.data += 0.3 * torch.randn(
                    factor.matrix.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(number)
                )
                factor.open_band(0, 1)
            for linear in (block.self_attn.o_proj, block.self_attn.q_proj):
                linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            attached(hidden, **others)
    for x in seen:
        levels = [len(token.unique()) for token in x.flatten(0, 1)]
        assert max(levels) <= grid.levels, "what the linear multiplies lies on the grid"
    assert len(seen) == 4 and torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


@torch.no_grad()
def test_other_candidates_do_not_carry_the_online_part() -> None:
    """Round-to-nearest of the same block, attached before or after, computes as if it were alone."""
    hidden, others = inputs()
    place = (SPEC, HEADS)
    plain = tiny_llama().model.layers[0]
    alone = attach(plain, *place, {}, MinMax, Scheme.parse("w3a16g32"), torch.float16)
    expected = alone.snapshot()(hidden, **others)
    merge(alone, torch.float16)
    attached = attached_block("w3a16g32", transforms=ONLINE)
    nearest = attach(attached.block, *place, {}, MinMax, Scheme.parse("w3a16g32"), torch.float16)
    assert torch.equal(nearest.snapshot()(hidden, **others), expected)
    assert torch.equal(nearest(hidden, **others), expected)
    assert not torch.equal(attached.snapshot()(hidden, **others), expected)
    merged = merge(nearest, torch.float16)
    assert not [name for name in merged if carrier(name)]
    assert state(attached.block) == state(plain)
    assert torch.equal(attached.block(hidden, **others), plain(hidden, **others))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_block_on_which_a_plan_was_tried_shows_no_trace(device: str) -> None:
    block = tiny_llama().model.layers[0].to(device)
    before = state(block)
    attached = attach(block, SPEC, HEADS, ONLINE, LearnedClipping, Scheme.parse("w3a16g32"), torch.float16)
    again = attach(block, SPEC, HEADS, ONLINE, LearnedClipping, Scheme.parse("w3a16g32"), torch.float16)
    assert {name: tensor.is_meta for name, tensor in block.named_parameters() if carrier(name)} == dict.fromkeys(
        PRODUCTS, device == "meta"
    )
    assert state(block) != before
    attached.detach()
    assert state(block) == before
    again.detach()
    adapt(block, SPEC, HEADS, ONLINE, Scheme.parse("w3a16g32"))
    assert state(block) == before


def test_gradient_passes_online_products() -> None:
    hidden, others = inputs()
    attached = attached_block("w4a16", transforms=ONLINE)
    attached(hidden, **others).square().mean().backward()
    for name, parameter in attached.transforms.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize(
    "site, factors, said",
    [
        ("query_key", [DENSE], "one matrix per head, got Affine: use Dense, or remove it from transforms.query_key"),
        ("query_key", [Kronecker], "one matrix per head, got Kronecker: use Dense"),
        ("mlp_input", [Dense], "got Dense, which is one invertible matrix .*or declare it online"),
        ("mlp_input", [AcrossHeads], "mixes several heads, got a site with 1"),
        ("mlp_input", [Clip], "part of rounding activations, got scheme w4a16.*remove it from transforms.mlp_input"),
        ("mlp_input", [DENSE, Diagonal], "got Diagonal behind an online factor: move it up"),
        ("mlp_input", [partial(DENSE, block=48)], "must divide the 64 channels of its site, got 48: use 1 or 2 or 4"),
        ("mlp_hidden", [partial(DENSE, block=48)], "must divide the 128 .* use 64, or null"),
        ("value_output", [partial(Affine, block=8)], "cuts an online matrix, got 8 without online"),
        ("mlp_input", [Affine], "Affine.*or declare it online .* for 4,096 multiply–adds per token and 4,096 numbers"),
        ("mlp_hidden", [Affine], "or declare it online .* for 16,384 multiply–adds per token and 16,384 numbers"),
    ],
)
def test_what_cannot_be_online_is_refused(site: str, factors: list, said: str) -> None:
    block = tiny_llama().model.layers[0]
    before = state(block)
    with pytest.raises(RequestError, match=said):
        attach(block, SPEC, HEADS, {site: factors}, None, Scheme.parse("w4a16"), torch.float16)
    assert state(block) == before


def test_several_consumers_behind_a_linear_are_refused() -> None:
    site = replace(next(site for site in SPEC.sites if site.name == "value_output"),
                   consumers=("self_attn.o_proj", "mlp.gate_proj"))  # fmt: skip
    with pytest.raises(RequestError, match="has one consumer, got self_attn.o_proj, mlp.gate_proj at value_output"):
        attach(tiny_llama().model.layers[0], replace(SPEC, sites=(site,)), HEADS, {"value_output": [DENSE]}, None,
               Scheme.parse("w4a16"), torch.float16)  # fmt: skip


def test_stored_products_of_an_unknown_kind_are_refused() -> None:
    block = tiny_llama().model.layers[0]
    with pytest.raises(RequestError, match="BlockProduct, .*got the tensors middle, right on input_layernorm"):
        install(block, {f"input_layernorm.online.0.{side}": torch.eye(2) for side in ("middle", "right")})


def test_linear_without_a_switch_takes_no_shift() -> None:
    block = tiny_llama().model.layers[0]
    bare = replace(SPEC, bias_switches={})
    with pytest.raises(RequestError, match="needs a bias on self_attn.q_proj.*transforms.attention_input"):
        attach(block, bare, HEADS, {"attention_input": [Shift]}, None, Scheme.parse("w4a16"), torch.float16)
