"""Architecture files name what exists, cover their model types, and refuse by name what they do not cover."""

from __future__ import annotations

import pytest
import torch
from tiny import MODELS, tiny_config
from torch import nn
from transformers import PreTrainedConfig

from aq_lightning.errors import RequestError
from aq_lightning.experts import stacks
from aq_lightning.models.loading import skeleton
from aq_lightning.models.lookup import architecture_of, heads_of, model_types, variants_of
from aq_lightning.models.sites import Fused, Heads

VARIANTS = [(model_type, index) for model_type in model_types() for index in range(len(variants_of(model_type)))]


def block_of(name: str) -> nn.Module:
    config = tiny_config(name)
    return skeleton(config).get_submodule(architecture_of(config).blocks)[0]


@pytest.mark.parametrize("model_type, index", VARIANTS)
def test_every_variant_has_a_tiny_model(model_type: str, index: int) -> None:
    """So that the sweeps reach it; a new architecture adds a line to tests/tiny.py."""
    variant = variants_of(model_type)[index]
    assert any(
        kind == model_type and architecture_of(tiny_config(name)) is variant for name, (kind, _) in MODELS.items()
    )


@pytest.mark.parametrize("name", MODELS)
def test_sites_name_modules_of_the_block(name: str) -> None:
    architecture, block = architecture_of(tiny_config(name)), block_of(name)
    modules = dict(block.named_modules())
    linears = {path for path, module in modules.items() if isinstance(module, nn.Linear)}
    linears |= stacks(block).keys()
    routers = {path for path in modules if path.endswith("mlp.gate")}
    assert stacks(block).keys() == architecture.experts.keys()
    assert set(architecture.stored) <= modules.keys() | {"lm_head"}
    assert len({site.name for site in architecture.sites}) == len(architecture.sites)
    for site in architecture.sites:
        assert set(site.consumers) <= linears | routers and bool(site.consumers) != bool(site.dual), site.name
        assert site.per_expert or site.dual or site.consumers[0] in modules, "whose input is seen"
        for member in filter(None, (site.producer, site.dual)):
            module, _, part = member.partition(":")
            assert module in modules.keys() | stacks(block).keys(), member
            assert not part or part in architecture.fused[module].parts, member
    assert set(architecture.fused) <= linears
    assert {linear for together in architecture.bias_switches.values() for linear in together} <= linears
    covered = {linear for site in architecture.sites for linear in site.consumers}
    hidden = {"fc2", "mlp.dense_4h_to_h"}  # behind a GELU there is no site
    assert (linears | routers) - covered <= hidden, "every linear's input is a site"


@pytest.mark.parametrize("name", MODELS)
def test_switches_switch_their_biases(name: str) -> None:
    """On gives all the linears named a bias, off takes it from all of them."""
    architecture = architecture_of(tiny_config(name))
    for switch, together in architecture.bias_switches.items():
        for state in (True, False):
            config = tiny_config(name, **{switch: state})
            block = skeleton(config).get_submodule(architecture.blocks)[0]
            assert all((block.get_submodule(linear).bias is not None) == state for linear in together), switch


@pytest.mark.parametrize("name", MODELS)
def test_heads_fit_the_output_projection(name: str) -> None:
    config = tiny_config(name)
    architecture = architecture_of(config)
    heads = heads_of(config, architecture)
    output = next(site for site in architecture.sites if site.name == "value_output").consumers[0]
    assert block_of(name).get_submodule(output).weight.shape[1] == heads.query * heads.size
    assert heads.query % heads.key_value == 0 and heads.rotary <= heads.size


def test_heads_of_unusual_layouts() -> None:
    def heads(name: str, **changes: object) -> Heads:
        config = tiny_config(name, **changes)
        return heads_of(config, architecture_of(config))

    assert heads("gemma2") == heads("qwen3") == Heads(query=4, key_value=2, size=24, rotary=24)
    assert heads("phi3-partial") == Heads(query=4, key_value=2, size=16, rotary=12)
    assert heads("gpt_neox") == Heads(query=4, key_value=4, size=16, rotary=4)
    assert heads("falcon-7b") == Heads(query=4, key_value=1, size=16, rotary=16)
    assert heads("falcon-40b") == Heads(query=4, key_value=2, size=16, rotary=16)
    assert heads("bloom").key_value == 4


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("opt", {"do_layer_norm_before": False}, "opt model must have do_layer_norm_before = True .*got False"),
        ("opt-gelu", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}, "do_layer_norm_before"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("falcon-7b", {"alibi": True}, "alibi = False .*got True"),
        ("falcon-40b", {"alibi": True}, "alibi = False .*got True"),
        ("falcon-rw", {"multi_query": True}, "multi_query = False .*got True"),
        ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "A falcon model must have .*its own variant"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"qwen3_moe model must have mlp_only_layers = \[\] .*got \[1\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "qwen3_moe model must have decoder_sparse_step = 1 .*got 2"),
    ],
)  # fmt: skip
def test_other_layout_is_refused(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        architecture_of(tiny_config(name, **changes))


@pytest.mark.parametrize("model_type", ["gpt2", "sites", "loading", "", "../llama"])
def test_unknown_architecture_is_refused(model_type: str) -> None:
    config = PreTrainedConfig()
    config.model_type = model_type
    with pytest.raises(RequestError, match="must be one of bloom, falcon, .* got .*docs/adding-an-architecture.md"):
        architecture_of(config)


@pytest.mark.parametrize(
    "fused, part, expected",
    [
        (Fused(("gate", "up")), "up", range(24, 48)),
        (Fused(("q", "k", "v"), ("query", "key_value", "key_value")), "q", range(0, 24)),
        (Fused(("q", "k", "v"), ("query", "key_value", "key_value")), "v", range(36, 48)),
        (Fused(("q", "k", "v"), ("query", "key_value", "key_value"), interleaved=True), "q",
         [*range(0, 12), *range(24, 36)]),
        (Fused(("q", "k", "v"), ("query", "key_value", "key_value"), interleaved=True), "k",
         [*range(12, 18), *range(36, 42)]),
    ],
)  # fmt: skip
def test_parts_of_a_fused_linear(fused: Fused, part: str, expected) -> None:
    """48 rows: four query heads and two key-value heads of six channels, or two halves."""
    rows = fused.rows(part, Heads(query=4, key_value=2, size=6, rotary=6))
    x = torch.randn(48, 5)
    assert torch.equal(rows.read(x), x[list(expected)])
    written = rows.write(x, rows.read(x) + 1)
    assert torch.equal(rows.read(written), x[list(expected)] + 1)
    others = [row for row in range(48) if row not in expected]
    assert torch.equal(written[others], x[others])
