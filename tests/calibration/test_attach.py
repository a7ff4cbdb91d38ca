"""What training sees is what the checkpoint will hold, and a detached block is what it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_close, tiny_llama
from torch import Tensor

from aq_lightning.calibration import AttachedBlock, attach, merge
from aq_lightning.calibration.attach import gained_biases, site_shape
from aq_lightning.errors import RequestError
from aq_lightning.models.llama import SPEC
from aq_lightning.models.sites import Heads, SiteShape
from aq_lightning.qtensor import QTensor
from aq_lightning.quantizers import LearnedClipping, MinMax, quantized_activations
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import Affine, Diagonal, RopePair, Shift

HEADS = Heads(query=4, key_value=2, size=16, rotary=16)
EVERYTHING = {
    "attention_input": [Shift, Diagonal],
    "query_key": [RopePair],
    "value_output": [Diagonal, Affine],
    "mlp_input": [Shift, Diagonal],
    "mlp_hidden": [Diagonal],
}
SCHEMES = ["w4a16", "w3a16g32", "w4a4", "w4a16g32sym", "w2a16g16", "w8a8"]


def attached_block(scheme: str, storage: torch.dtype = torch.float16, transforms=EVERYTHING) -> AttachedBlock:
    """With random parameters, far from where they start."""
    block = tiny_llama().model.layers[0]
    attached = attach(block, SPEC, HEADS, transforms, LearnedClipping, Scheme.parse(scheme), storage)
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
    assert shapes["query_key"] == SiteShape(*shape, rotary=16) and shapes["value_output"] == SiteShape(*shape)
    assert shapes["attention_input"] == SiteShape(1, 64) and shapes["mlp_hidden"] == SiteShape(1, 128)


def test_linear_without_a_switch_takes_no_shift() -> None:
    block = tiny_llama().model.layers[0]
    bare = replace(SPEC, bias_switches={})
    with pytest.raises(RequestError, match="needs a bias on self_attn.q_proj.*transforms.attention_input"):
        attach(block, bare, HEADS, {"attention_input": [Shift]}, None, Scheme.parse("w4a16"), torch.float16)
