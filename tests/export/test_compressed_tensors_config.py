"""The configuration says the whole scheme, and nothing that it does not understand passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aq_lightning.errors import RequestError
from aq_lightning.export.compressed_tensors_config import own_config, quantization_config, scheme_of, split_config
from aq_lightning.scheme import Grid, Scheme

GRIDS = st.builds(Grid, st.integers(2, 8), st.none() | st.integers(1, 256), st.booleans())
ACTIVATIONS = st.none() | st.builds(Grid, st.integers(2, 8), st.none(), st.booleans())


@given(st.builds(Scheme, GRIDS, ACTIVATIONS))
def test_round_trip(scheme: Scheme) -> None:
    config = json.loads(json.dumps(quantization_config(scheme, ["lm_head"])))
    assert config["ignore"] == ["lm_head"]
    assert scheme_of(config) == scheme


@pytest.mark.parametrize("name", ["w4a16", "w3a16g64", "w4a4", "w8a8sym", "w2a8g32"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_reads_what_compressed_tensors_makes_of_it(name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    scheme = Scheme.parse(name)
    ours = quantization_config(scheme, ["lm_head"])
    theirs = QuantizationConfig.model_validate(ours).model_dump(mode="json")
    extra = {"version": "0.17.1", "sparsity_config": {}, "transform_config": {}}  # as its save routine adds
    assert scheme_of(theirs | extra) == scheme


def change(*path: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    def apply(config: dict[str, Any]) -> None:
        for key in path:
            config = config[key]
        config.update(values)

    return apply


GROUP = ("config_groups", "group_0")
WEIGHTS, INPUTS = (*GROUP, "weights"), (*GROUP, "input_activations")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(quant_method="gptq"), "quant_method must be 'compressed-tensors', got 'gptq'"),
        (change(format="frozen"), "format must be 'pack-quantized' or 'int-quantized', got 'frozen'"),
        (lambda config: config.pop("format"), "format must be 'pack-quantized' or 'int-quantized', got None"),
        (change(quantization_status="frozen"), "quantization_status must be 'compressed', got 'frozen'"),
        (change(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme must be None"),
        (change(transform_config={"config_groups": {"R1": {}}}), r"got \['transform_config'\]: remove"),
        (change("config_groups", group_1={}), r"1 config group, got \['group_0', 'group_1'\]"),
        (change(config_groups={}), r"1 config group, got \[\]"),
        (change(config_groups={"W8A8": ["Linear"]}), r"spelled out, got W8A8: \['Linear'\]"),
        (change(*GROUP, format="int-quantized"), "group_0.format must be 'pack-quantized'"),
        (change(*GROUP, output_activations={"num_bits": 8}), "group_0.output_activations must be None"),
        (change(*WEIGHTS, actorder="group"), "weights.actorder must be None, got 'group'"),
        (change(*WEIGHTS, type="float"), "weights.type must be 'int', got 'float'"),
        (change(*WEIGHTS, strategy="block", block_structure=[128, 128]), "weights.block_structure must be None"),
        (change(*WEIGHTS, strategy="tensor"), "weights.strategy is group or channel, got 'tensor'"),
        (change(*WEIGHTS, group_size=None), "goes with strategy 'group', got None with 'group'"),
        (change(*WEIGHTS, strategy="channel"), "goes with strategy 'group', got 32 with 'channel'"),
        (change(*WEIGHTS, dynamic=True), "weights.dynamic must be False, got True"),
        (change(*WEIGHTS, num_bits=16), "2 to 8 bits, got 16"),
        (change(*WEIGHTS, novelty=1), r"weights must hold only keys .* got \['novelty'\]"),
        (change(*INPUTS, dynamic=False), "input_activations.dynamic must be True, got False"),
        (change(*INPUTS, strategy="tensor"), "input_activations.strategy is token, got 'tensor'"),
    ],
)
def test_refusals(edit: Callable[[dict[str, Any]], None], message: str) -> None:
    config = quantization_config(Scheme.parse("w4a8g32"), [])
    config = json.loads(json.dumps(config))
    edit(config)
    with pytest.raises(RequestError, match=message):
        scheme_of(config)


@given(
    st.builds(Scheme, GRIDS, ACTIVATIONS),
    st.none() | st.builds(Grid, st.integers(2, 8), st.none() | st.integers(1, 99)),
    st.booleans(),
)
def test_own_section_round_trip(scheme: Scheme, cache: Grid | None, static: bool) -> None:
    inner = quantization_config(scheme, ["lm_head"])
    whole = scheme if cache is None else replace(scheme, key_value=cache, static_cache=static)
    config = json.loads(json.dumps(own_config(inner, ["model.norm"], whole)))
    section, modules, fields = split_config(config)
    assert (section, modules) == (inner, ["model.norm"]) and replace(scheme, **fields) == whole
    assert ("static" in str(config)) == (static and cache is not None)
    assert split_config(inner) == (inner, [], {})


@pytest.mark.parametrize(
    "cache", [{}, {"bits": 4}, {"bits": "4", "group_size": None}, {"bits": 4, "group_size": 8, "zero": 1}, [4], 4]
    + [{"bits": 9, "group_size": None}, {"bits": None, "group_size": None}, {"bits": 4, "group_size": 0}]
)  # fmt: skip
def test_a_cache_that_is_not_understood_is_refused(cache: object) -> None:
    config = own_config(quantization_config(Scheme.parse("w4a4"), []), [], Scheme.parse("w4a4")) | {"key_value": cache}
    with pytest.raises(RequestError, match="got"):
        split_config(config)
