"""Attention whose rotary embedding is another function's: copies, pickles and compilers see what they saw before."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from types import FunctionType

import pytest
import torch
from helpers import assert_close, tiny_llama
from tiny import MODELS, tiny_config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from aq_lightning.models.written import embed_by, embeds_by_halves

IDS = torch.arange(24).reshape(2, 12) * 7 % 94 + 1
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gemma2", "gemma3_text", "falcon")
calls: list[Tensor] = []


def counted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers', and what it was called with."""
    if not torch.compiler.is_compiling():
        calls.append(q)
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("Attention")]


def embedded() -> LlamaForCausalLM:
    model = tiny_llama()
    for module in attentions(model):
        assert embeds_by_halves(module)
        embed_by(module, counted)
    return model


def times(work: Callable[[], object]) -> int:
    """How often the function was called meanwhile."""
    calls.clear()
    work()
    return len(calls)


@pytest.mark.parametrize("name", MODELS)
def test_who_is_known(name: str) -> None:
    """Others turn part of a head, neighbouring channels, or nothing."""
    model = AutoModelForCausalLM.from_config(tiny_config(name))
    found = {module for module in model.modules() if embeds_by_halves(module)}
    assert found == (set(attentions(model)) if name.partition("-")[0] in KNOWN else set())


@torch.no_grad()
def test_it_is_called_once_a_layer_and_nothing_else_changes() -> None:
    plain, model = tiny_llama(), embedded()
    assert times(lambda: assert_close("logits", plain(IDS).logits, model(IDS).logits, 1e-7)) == 2
    assert repr(model) == repr(plain) and list(model.state_dict()) == list(plain.state_dict())
    module = attentions(model)[0]
    assert isinstance(module, modeling_llama.LlamaAttention) and type(module) is type(attentions(model)[1])
    assert type(module).__module__ == modeling_llama.__name__ and not embeds_by_halves(module)
    model.set_attn_implementation("eager")
    assert [part.shape for part in model(IDS, output_attentions=True).attentions] == [(2, 4, 12, 12)] * 2
    assert times(lambda: plain(IDS)) == 0, "its file is as it was"


@torch.no_grad()
def test_a_copy_has_its_own_modules() -> None:
    model = embedded()
    before, other = model(IDS).logits, deepcopy(model)
    for mine, copied in zip(attentions(model), attentions(other), strict=True):
        assert type(mine) is type(copied) and mine is not copied and mine.q_proj is not copied.q_proj
    for parameter in other.parameters():
        parameter.zero_()
    assert not other(IDS).logits.any() and torch.equal(model(IDS).logits, before)
    other.load_state_dict(model.state_dict())
    assert times(lambda: assert_close("copied", before, other(IDS).logits, 1e-7)) == 2
    shallow = copy(attentions(model)[0])
    assert type(shallow) is type(attentions(model)[0]) and shallow.q_proj is attentions(model)[0].q_proj


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@torch.no_grad()
def test_pickles_keep_it(protocol: int) -> None:
    module = attentions(embedded())[0]
    loaded = pickle.loads(pickle.dumps(module, protocol))
    assert type(loaded) is type(module) and torch.equal(loaded.q_proj.weight, module.q_proj.weight)
    assert list(loaded.state_dict()) == list(module.state_dict()) and not loaded.training


@torch.no_grad()
def test_saved_whole_and_as_transformers_does(tmp_path: Path) -> None:
    model, file = embedded(), io.BytesIO()
    before = model(IDS).logits
    torch.save(model, file)
    file.seek(0)
    whole = torch.load(file, weights_only=False)
    assert times(lambda: assert_close("saved whole", before, whole(IDS).logits, 1e-7)) == 2
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert times(lambda: assert_close("saved", before, again(IDS).logits, 1e-7)) == 0
    half = model.to(torch.bfloat16)
    assert times(lambda: half(IDS)) == 2 and calls[0].dtype == torch.bfloat16


@torch.no_grad()
def test_compiled_as_often_as_before_in_one_graph() -> None:
    counts: dict[str, list[int]] = {}
    for name, model in (("plain", tiny_llama()), ("other", embedded())):
        expected = model(IDS).logits
        for parts in ([model], attentions(model)):
            torch._dynamo.reset()
            counter = CompileCounter()
            for part in parts:
                part.compile(backend=counter, fullgraph=True)
            for _ in range(2):
                assert_close("compiled", expected, model(IDS).logits, 1e-5)
            counts.setdefault(name, []).append(counter.frame_count)
            for part in parts:
                part._compiled_call_impl = None
    torch._dynamo.reset()
    assert counts["plain"] == counts["other"], "graphs of the model, of each attention"


def test_a_module_of_a_function_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package ``kernels`` makes one, whose ``forward`` it may replace."""
    function = modeling_llama.apply_rotary_pos_emb

    class Func(nn.Module):
        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)

    model, made = tiny_llama(), Func()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", made)
    assert all(map(embeds_by_halves, attentions(model)))
    made.forward = lambda *args: args
    assert not any(map(embeds_by_halves, attentions(model)))


def test_what_is_written_otherwise_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    first, second = attentions(model)
    first.forward = first.forward
    assert not embeds_by_halves(first) and embeds_by_halves(second) and not embeds_by_halves(model)

    def rotate_half(x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    pairs = FunctionType(
        modeling_llama.apply_rotary_pos_emb.__code__, {**vars(modeling_llama), "rotate_half": rotate_half}
    )
    pairs.__defaults__ = (1,)
    doubled = FunctionType(pairs.__code__, vars(modeling_llama), None, (2,))
    for other in (pairs, doubled, counted, None):
        with monkeypatch.context() as patch:
            names = {**vars(modeling_llama), "apply_rotary_pos_emb": other}
            patch.setattr(
                modeling_llama.LlamaAttention,
                "forward",
                FunctionType(modeling_llama.LlamaAttention.forward.__code__, names),
            )
            assert not embeds_by_halves(second)
    assert embeds_by_halves(second)


def test_heads_behind_tokens_are_left_to_transformers() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
            return apply_rotary_pos_emb(q, q, cos, cos, unsqueeze_dim=2)  # noqa: F821

    names = {"apply_rotary_pos_emb": modeling_llama.apply_rotary_pos_emb}
    Attention.forward = FunctionType(Attention.forward.__code__, names)
    module, q, cos = Attention(), torch.randn(2, 5, 4, 8), torch.randn(2, 5, 8)
    before = module(q, cos)
    assert embeds_by_halves(module)
    embed_by(module, counted)
    assert times(lambda: torch.testing.assert_close(module(q, cos), before)) == 0
