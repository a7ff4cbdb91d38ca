"""Packed models attend from one token by the package's kernel, and to the same answer."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from helpers import assert_close
from tiny import tiny
from torch import Tensor
from transformers import PreTrainedModel

from aq_lightning.attention import attentions, hook_attention
from aq_lightning.deploy import attending
from aq_lightning.deploy.attending import attend, attend_fast
from aq_lightning.deploy.decoding import Decoder, Sampling, Shape
from aq_lightning.quantizers.activations import quantize_cache
from aq_lightning.scheme import Grid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.arange(12).view(2, 6) + 3
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """One token is attended from by the operator on a CPU too; shapes of the caches it read."""
    seen: list[tuple[int, ...]] = []

    def counted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        seen.append(tuple(key.shape))
        return operator(query, key, value, mask, scale)

    operator = attending.decode_attention
    monkeypatch.setattr(attending, "decode_attention", counted)
    if DEVICE == "cpu":
        monkeypatch.setattr(attending, "suits", lambda query, *_: query.shape[2] == 1)
    return seen


def model_of(name: str) -> PreTrainedModel:
    """In half precision on a GPU."""
    model = tiny(name).model.eval().requires_grad_(False)
    return model.to(DEVICE, torch.float16 if DEVICE == "cuda" else torch.float32)


def logits(model: PreTrainedModel, compiled: bool = False) -> Tensor:
    """Of five steps over a static cache behind left-padded prompts."""
    torch.compiler.reset()
    decoder = Decoder(model, Shape(2, 24), "plain")
    decoder._read(IDS, MASK)
    step, found = torch.compile(decoder._logits, fullgraph=True, backend="eager") if compiled else decoder._logits, []
    with torch.no_grad():
        for token in range(5):
            decoder._token.fill_(token + 7)
            found.append(step().float().cpu())
    return torch.stack(found)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "gpt_neox"])
def test_steps_answer_as_before(name: str, everywhere: list[tuple[int, ...]]) -> None:
    model = model_of(name)
    expected = logits(model)
    fast = attend_fast(deepcopy(model))
    assert_close("logits", expected, logits(fast), 3e-3 if DEVICE == "cuda" else 1e-5)
    layers = model.config.num_hidden_layers
    assert len(everywhere) == 5 * layers and {shape[2] for shape in everywhere} == {24}
    assert torch.equal(logits(model), expected) and len(everywhere) == 5 * layers, "the model that was copied stays"
    assert_close("compiled", expected, logits(fast, compiled=True), 3e-3 if DEVICE == "cuda" else 1e-5)


@pytest.mark.parametrize("name", ["falcon-7b", "falcon-40b", "falcon-rw", "bloom"])
def test_attention_that_looks_for_no_function_stays(name: str, everywhere: list[tuple[int, ...]]) -> None:
    """It would take the name of another for its plain form, and what hides tokens for what is added to scores."""
    model = model_of(name)
    assert torch.equal(logits(model), logits(attend_fast(deepcopy(model)))) and not everywhere


def test_hooks_come_first(everywhere: list[tuple[int, ...]]) -> None:
    """Those of before and of after, such as rounding of keys and values."""
    model = model_of("llama")
    for part in attentions(model):
        hook_attention(part, lambda heads: quantize_cache(heads, Grid(4, symmetric=False)))
    expected = logits(model)
    attend_fast(model)
    assert_close("rounded", expected, logits(model), 3e-3 if DEVICE == "cuda" else 1e-5)
    called: list[int] = []
    handle = hook_attention(attentions(model)[0], lambda heads: called.append(1) or heads)
    logits(model)
    handle.remove()
    logits(model)
    assert len(called) == 6 and len(everywhere) == 15 * model.config.num_hidden_layers


def test_other_functions_stay_and_so_does_what_the_kernel_cannot_do(
    everywhere: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attend_fast(model_of("llama"))
    expected = logits(model)
    assert everywhere
    everywhere.clear()
    model.set_attn_implementation("eager")
    assert_close("eager", expected, logits(model), 3e-3 if DEVICE == "cuda" else 1e-5)
    assert not everywhere, "the model's configuration still decides"
    assert len(model(IDS.to(DEVICE), output_attentions=True).attentions) == model.config.num_hidden_layers
    model.set_attn_implementation("sdpa")
    module = attentions(model)[0]
    x = torch.randn(1, 4, 1, 16, device=DEVICE, dtype=torch.float16 if DEVICE == "cuda" else torch.float32)
    bias = torch.zeros(1, 1, 1, 1, dtype=x.dtype, device=DEVICE)
    assert attend(module, x, x, x, None, position_bias=bias)[0].shape == (1, 1, 4, 16) and not everywhere
    with monkeypatch.context() as patch:
        patch.setattr(attending, "sdpa", lambda: lambda *_, **named: named)
        assert attend(module, x, x, x, None, softcap=30.0) == {"softcap": 30.0, "dropout": 0.0, "scaling": None}
    assert attend(module, x, x, x, None)[0].shape == (1, 1, 4, 16) and everywhere == [(1, 4, 1, 16)]


def test_answers_of_the_decoder(everywhere: list[tuple[int, ...]]) -> None:
    model = model_of("qwen2")
    expected, found = (
        [token.tolist() for token in Decoder(each, Shape(2, 24), "plain").stream(IDS, MASK, 6, Sampling())]
        for each in (model, attend_fast(deepcopy(model)))
    )
    assert found == expected and everywhere
