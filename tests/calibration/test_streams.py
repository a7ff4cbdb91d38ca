"""Streams are what the model itself computes, block by block."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, tiny_llama
from tiny import MODELS, called, tiny
from torch import Tensor
from transformers import LlamaForCausalLM

from aq_lightning.calibration.attach import attach
from aq_lightning.calibration.streams import capture, check_finite, each_answer, gathered, run, to_device
from aq_lightning.errors import RequestError
from aq_lightning.kernels.products import onednn_is_exact
from aq_lightning.recipe import StreamStorage
from aq_lightning.scheme import Scheme

CPU = torch.device("cpu")
FLOAT32 = StreamStorage(dtype="float32")


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama().requires_grad_(False)


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, 96, (5, 24))


def test_streams_are_the_models_hidden_states(model: LlamaForCausalLM, windows: Tensor) -> None:
    """Through every block, against transformers' own forward pass of the whole batch."""
    expected = model(windows, output_hidden_states=True).hidden_states
    stream, arguments = capture(model, windows, FLOAT32, CPU)
    assert_close("input of block 0", expected[0], stream, 1e-6)
    first = run([model.model.layers[0]], arguments[:1], stream, 2, CPU)
    assert_close("input of block 1", expected[1], first, 1e-6)
    both = run(model.model.layers, arguments, stream, 2, CPU)
    assert_close("both blocks at once", run([model.model.layers[1]], arguments[1:], first, 2, CPU), both, 1e-6)
    logits = model.lm_head(model.model.norm(both))
    assert_close("logits", model(windows).logits, logits, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_products_are_as_exact_as_the_stream(dtype: torch.dtype) -> None:
    device, seen = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []

    def block(hidden: Tensor) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return hidden

    run([block], [{}], torch.ones(3, 4, 8, dtype=dtype), 2, device)
    on_gpu = "high" if dtype == torch.float16 else "highest"
    assert set(seen) == {on_gpu if device.type == "cuda" else "medium" if onednn_is_exact() else "highest"}
    assert torch.get_float32_matmul_precision() == "highest"


def test_comparison_sees_a_missing_mask(model: LlamaForCausalLM, windows: Tensor) -> None:
    """Negative control: the arguments matter."""
    stream, arguments = capture(model, windows, FLOAT32, CPU)
    whole = run(model.model.layers, arguments, stream, 2, CPU)
    late = [{**others, "position_embeddings": tuple(t.flip(1) for t in others["position_embeddings"])}
            for others in arguments]  # fmt: skip
    assert (run(model.model.layers, late, stream, 2, CPU) - whole).abs().max() > 1e-3


def test_capture_leaves_the_model_as_it_was(model: LlamaForCausalLM, windows: Tensor) -> None:
    before, state = model(windows).logits, {name: t.clone() for name, t in model.state_dict().items()}
    capture(model, windows, FLOAT32, CPU)
    assert all("forward" not in vars(block) for block in model.model.layers)
    assert torch.equal(model(windows).logits, before)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_behind_the_first_window_nothing_behind_the_blocks_is_computed(
    model: LlamaForCausalLM, windows: Tensor
) -> None:
    seen: list[Tensor] = []
    model.model.norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    stream, _ = capture(model, windows, FLOAT32, CPU)
    assert len(seen) == 1 and torch.equal(seen[0], stream[:1])


def test_failed_capture_puts_the_blocks_back(model: LlamaForCausalLM) -> None:
    with pytest.raises(IndexError):
        capture(model, torch.full((1, 8), 96), FLOAT32, CPU)
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_capture_needs_no_block_weights(model: LlamaForCausalLM, windows: Tensor) -> None:
    expected, _ = capture(model, windows, FLOAT32, CPU)
    for block in model.model.layers:
        block.to("meta")
    stream, arguments = capture(model, windows, FLOAT32, CPU)
    assert torch.equal(stream, expected) and len(arguments) == 2


def test_batch_size_does_not_matter(model: LlamaForCausalLM, windows: Tensor) -> None:
    stream, arguments = capture(model, windows, FLOAT32, CPU)
    reference = run(model.model.layers, arguments, stream, 1, CPU)
    for size in (2, 5, 9):
        assert_close(f"batch {size}", reference, run(model.model.layers, arguments, stream, size, CPU), 1e-6)


def test_run_returns_a_new_stream(model: LlamaForCausalLM, windows: Tensor) -> None:
    stream, arguments = capture(model, windows, StreamStorage(), CPU)
    before = stream.clone()
    result = run(model.model.layers, arguments, stream, 2, CPU)
    assert torch.equal(stream, before) and result.dtype == stream.dtype == torch.float16


def test_half_precision_model_is_captured_in_full_precision(model: LlamaForCausalLM, windows: Tensor) -> None:
    """Rotary tables above all: a cosine in float16 is off by 5e-4."""
    _, expected = capture(model, windows, FLOAT32, CPU)
    half = tiny_llama().to(torch.float16)
    half.model.rotary_emb = tiny_llama().model.rotary_emb
    _, arguments = capture(half, windows, FLOAT32, CPU)
    for name, reference, actual in zip(
        ("cos", "sin"), expected[0]["position_embeddings"], arguments[0]["position_embeddings"], strict=True
    ):
        assert actual.dtype == torch.float32
        assert_close(name, reference, actual, 1e-6)


def test_overflow_is_refused(model: LlamaForCausalLM, windows: Tensor) -> None:
    stream, arguments = capture(model, windows, StreamStorage(), CPU)
    model.model.layers[0].mlp.down_proj.weight.mul_(1e7)
    with pytest.raises(RequestError, match="finite torch.float16.*model.streams.dtype"):
        check_finite(*gathered(each_answer([model.model.layers[0]], arguments[:1], stream, 2, CPU), stream))
    wide = run([model.model.layers[0]], arguments[:1], stream.float(), 2, CPU)
    assert wide.isfinite().all() and wide.abs().max() > torch.finfo(torch.float16).max


def test_not_a_number_is_refused(model: LlamaForCausalLM, windows: Tensor) -> None:
    model.model.embed_tokens.weight[3] = float("nan")
    with pytest.raises(RequestError, match="NaN"):
        capture(model, torch.full((1, 8), 3), FLOAT32, CPU)


def test_to_device_reaches_into_containers() -> None:
    moved = to_device({"a": (torch.ones(1), [torch.ones(2)]), "b": None, "c": 3}, torch.device("meta"))
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta
    assert isinstance(moved["a"], tuple) and isinstance(moved["a"][1], list) and (moved["b"], moved["c"]) == (None, 3)


@pytest.mark.parametrize("name", MODELS)
def test_streams_of_every_architecture(name: str, windows: Tensor) -> None:
    """Tuples, ALiBi, sliding windows: the last block answers what the model's own loop gets."""
    small = tiny(name, torch.float32)
    last = called(small, len(small.blocks) - 1, tokens=windows)
    stream, arguments = capture(small.model, windows, FLOAT32, CPU)
    for size in (2, 5):
        assert_close("last hidden state", last.answer, run(small.blocks, arguments, stream, size, CPU), 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_attached_block_takes_captured_arguments(name: str, windows: Tensor) -> None:
    small = tiny(name, torch.float32)
    stream, arguments = capture(small.model, windows, FLOAT32, CPU)
    attached = attach(small.blocks[0], small.architecture, small.heads, {}, None, Scheme.parse("w4a16"), torch.float32)
    expected = run(small.blocks[:1], arguments[:1], stream, 5, CPU)
    with torch.no_grad():
        assert_close("forward", expected, attached(stream, **arguments[0]), 1e-6)
        assert_close("snapshot", expected, run([attached.snapshot()], arguments[:1], stream, 2, CPU), 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_in_pinned_memory_pass_as_those_beside_the_blocks(model: LlamaForCausalLM, windows: Tensor) -> None:
    device = torch.device("cuda")
    stream, arguments = capture(model, windows, StreamStorage(), CPU)
    blocks, there = model.model.layers.to(device), [to_device(each, device) for each in arguments]
    expected, pinned = run(blocks, there, stream.to(device), 2, device).cpu(), stream.pin_memory()
    torch.cuda._sleep(10**8)  # so that copies are late
    result = run(blocks, there, pinned, 2, device)
    found = result.clone()
    assert result.is_pinned() and torch.equal(found, expected)
