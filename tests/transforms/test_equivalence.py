"""The first law: with every quantizer off a block answers as before, before and after merge."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, relative_error, tiny_llama, with_true_norms

from aq_lightning.calibration import attach, merge
from aq_lightning.models.llama import SPEC
from aq_lightning.models.sites import Heads
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import Affine, Diagonal, RopePair, Shift

EVERYTHING = {
    "attention_input": [Shift, Diagonal],
    "query_key": [RopePair],
    "value_output": [Shift, Diagonal, Affine],
    "mlp_input": [Shift, Diagonal],
    "mlp_hidden": [Diagonal],
}
SINGLE = [{site: [factor]} for site, factors in EVERYTHING.items() for factor in factors]


def label(transforms):
    return "everything" if transforms is EVERYTHING else "-".join(f"{s}-{f[0].__name__}" for s, f in transforms.items())


def block_and_inputs(**changes):
    model = with_true_norms(tiny_llama(**changes).double())
    hidden = torch.randn(2, 16, 64, dtype=torch.float64)
    position_embeddings = model.model.rotary_emb(hidden, torch.arange(16)[None])
    return model.model.layers[0], hidden, {"position_embeddings": position_embeddings}


def scrambled(block, transforms, scheme="w4a16"):
    """Attached without rounding, with random parameters far from the identity and the whole band open."""
    heads = Heads(4, block.self_attn.k_proj.out_features // 16, 16, 16)
    attached = attach(block, SPEC, heads, transforms, None, Scheme.parse(scheme), torch.float64)
    for name, parameter in attached.transforms.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.data += 0.5 * noise if "matrix" not in name else noise / noise.shape[-1] ** 0.5
    for module in attached.modules():
        if isinstance(module, Affine):
            module.open_band(0, 1)
    return attached


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
@pytest.mark.parametrize("transforms", [*SINGLE, EVERYTHING], ids=label)
def test_block_is_unchanged(transforms, scheme, kv_heads, biases):
    block, hidden, others = block_and_inputs(num_key_value_heads=kv_heads, attention_bias=biases, mlp_bias=biases)
    with torch.no_grad():
        reference = block(hidden, **others)
        attached = scrambled(block, transforms, scheme)
        assert_close("before merge", reference, attached(hidden, **others), 1e-10)
        merge(attached, torch.float64)
        assert_close("after merge", reference, block(hidden, **others), 1e-10)
        assert isinstance(block, type(tiny_llama().model.layers[0])), "the block is what it was"


@pytest.mark.parametrize("transforms", SINGLE, ids=label)
def test_transform_moves_the_weights(transforms):
    """The law is not met by doing nothing: both sides of every transform change."""
    block, *_ = block_and_inputs()
    attached = scrambled(block, transforms, "w4a4")
    before = dict(block.named_parameters())
    after = attached.effective(torch.float64)
    reference = {name: before.get(name, torch.zeros_like(tensor)) for name, tensor in after.items()}
    moved = [name for name in after if (after[name] - reference[name]).abs().max() > 1e-2]
    if transforms in ({"attention_input": [Shift]}, {"mlp_input": [Shift]}):
        assert not moved, "an RMSNorm cannot subtract: such a shift acts through rounding errors alone"
    else:
        assert len(moved) >= 2, moved


@pytest.mark.parametrize("site", list(EVERYTHING))
def test_one_sided_transform_is_noticed(site):
    """Negative control: leaving out the far side of any one site breaks the block."""
    block, hidden, others = block_and_inputs()
    with torch.no_grad():
        reference = block(hidden, **others)
        attached = scrambled(block, {site: [f for f in EVERYTHING[site] if f is not Shift]})
        original = dict(block.named_parameters())
        tensors = attached.effective(torch.float64)
        spec = next(s for s in SPEC.sites if s.name == site)
        far = spec.dual or spec.consumers[0]
        tensors[f"{far}.weight"] = original[f"{far}.weight"]
        broken = torch.func.functional_call(block, tensors, (hidden,), others)
        assert relative_error(reference, broken) > 1e-3


def test_matrix_before_rope_is_noticed():
    """Negative control: a general matrix per head between q and k does not commute with rotary embedding."""
    block, hidden, others = block_and_inputs()
    with torch.no_grad():
        reference = block(hidden, **others)
        matrix = torch.eye(16, dtype=torch.float64) + 0.2 * torch.randn(16, 16, dtype=torch.float64)
        for linear, side in ((block.self_attn.q_proj, matrix.inverse().T), (block.self_attn.k_proj, matrix)):
            weight = linear.weight.view(-1, 16, 64)
            linear.weight.data = (side @ weight).flatten(0, 1)
        assert relative_error(reference, block(hidden, **others)) > 1e-3
