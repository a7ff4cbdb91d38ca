"""A prompt read by a recorded pass is answered as one read plainly, whatever was read before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_close, tiny_llama
from tiny import MODELS, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from aq_lightning.deploy import decoding, reading
from aq_lightning.deploy.decoding import Decoder, Sampling, Shape, Way

GPU = torch.cuda.is_available()


class Replayed:
    """Stands in for a graph: the same work on the same tensors, its answer in the same place."""

    made: list[Replayed]

    def __init__(self, work: Callable[[], Tensor], warm_up: int, beside: Replayed | None = None) -> None:
        for _ in range(warm_up):
            work()
        self._work, self.result, self.beside, self.replays = work, work(), beside, 0
        self.made.append(self)

    def replay(self) -> Tensor:
        self.replays += 1
        return self.result.copy_(self._work())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    """Recorded passes, of lengths that are multiples of 4."""
    steps = type("Steps", (Replayed,), {"made": []})
    found: list[Replayed] = []
    monkeypatch.setattr(decoding, "Graph", steps)
    monkeypatch.setattr(reading, "Graph", type("Passes", (Replayed,), {"made": found}))
    monkeypatch.setattr(reading, "_STEP", 4)
    return found


def answer(decoder: Decoder, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return torch.stack(list(decoder.stream(ids, mask, 6, Sampling())), 1)


def decoders(model: PreTrainedModel, batch: int = 2, length: int = 32) -> tuple[Decoder, Decoder]:
    ways: tuple[Way, Way] = ("plain", "recorded")
    plain, recorded = (Decoder(model, Shape(batch, length), way) for way in ways)
    return plain, recorded


def prompt(tokens: int, batch: int = 2) -> Tensor:
    return torch.randint(3, 96, (batch, tokens))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tokens_of_every_kind_of_model(name: str, passes: list[Replayed]) -> None:
    """Lengths with and without padding, in the way of a sliding window, and with steps behind them."""
    model = AutoModelForCausalLM.from_config(tiny_config(name)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    plain, recorded = decoders(model)
    for tokens in (9, 9, 12, 11, 3, 10, 1, 2, 26):
        ids = prompt(tokens)
        assert torch.equal(answer(recorded, ids), answer(plain, ids)), f"{tokens}"
        assert_close("logits", plain._read(ids, None), recorded._read(ids, None), 1e-5)
    assert [each.replays for each in passes] == [9, 5, 1]  # of 9 to 12, to 4, and 28, which come twice each above


def test_the_first_of_a_length_and_padded_prompts_are_not_recorded(passes: list[Replayed]) -> None:
    plain, recorded = decoders(tiny_llama())
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    for _ in range(3):
        ids = prompt(8)
        assert torch.equal(answer(recorded, ids, mask), answer(plain, ids, mask))
    for expected in (0, 1, 1):
        answer(recorded, prompt(8))
        assert len(passes) == expected
    for _ in range(3):
        answer(plain, prompt(8))
    assert len(passes) == 1


@torch.no_grad()
def test_a_prompt_has_the_same_shape_the_first_time(passes: list[Replayed]) -> None:
    """So that it is read by the same kernels, and answered alike."""
    model, widths = tiny_llama(), []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    _, recorded = decoders(model)
    ids = prompt(6)
    first = recorded._read(ids, None).clone()
    assert torch.equal(recorded._read(ids, None), first)
    assert set(widths) == {8} and len(passes) == 1


@torch.no_grad()
def test_recordings_give_their_memory_to_what_needs_it(passes: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, recorded = decoders(tiny_llama())
    for _ in range(2):
        answer(recorded, prompt(8))
    through, left = reading.Reader._pass, [1]

    def short(self: reading.Reader, *arguments: object) -> Tensor:
        if left.pop() if left else False:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return through(self, *arguments)

    monkeypatch.setattr(reading.Reader, "_pass", short)
    ids = prompt(15)
    assert torch.equal(answer(recorded, ids), answer(plain, ids))
    assert not recorded._reader._passes
    left.append(1)
    with pytest.raises(torch.OutOfMemoryError):
        answer(recorded, prompt(8))


def test_few_and_short_passes_are_kept(passes: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_KEPT", 2)
    monkeypatch.setattr(reading, "_LONGEST", 24)
    plain, recorded = decoders(tiny_llama())
    for tokens in (16, 16, 4, 4, 8, 8, 12, 12, 12, 4):
        ids = prompt(tokens)
        assert torch.equal(answer(recorded, ids), answer(plain, ids))
    assert [each.replays for each in passes] == [2, 1], "of 4 and 8: 16 are too many for two prompts, 12 too late"
    assert passes[0].beside is None and passes[1].beside is passes[0], "one memory"


def test_no_pass_is_longer_than_the_cache(passes: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_STEP", 64)
    plain, recorded = decoders(tiny_llama(), length=20)
    for tokens in (14, 9, 14):
        ids = prompt(tokens)
        assert torch.equal(answer(recorded, ids), answer(plain, ids))
    assert len(passes) == 1


def test_what_cannot_be_recorded_is_read_plainly(passes: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(work: Callable[[], Tensor], warm_up: int, beside: object) -> None:
        work()
        raise torch.OutOfMemoryError("out of memory\nand so on")

    monkeypatch.setattr(reading, "Graph", refuse)
    plain, recorded = decoders(tiny_llama())
    answer(recorded, prompt(8))
    with pytest.warns(UserWarning, match="prompts are read without recordings: out of memory$"):
        answer(recorded, prompt(8))
    for tokens in (8, 8, 5, 5):
        ids = prompt(tokens)
        assert torch.equal(answer(recorded, ids), answer(plain, ids))


@pytest.mark.skipif(not GPU, reason="records on a GPU")
def test_recorded_passes_answer_the_same_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_STEP", 4)
    plain, recorded = decoders(tiny_llama().cuda())
    for tokens in (9, 9, 12, 3, 3, 11, 2, 10):
        ids = prompt(tokens)
        assert torch.equal(answer(recorded, ids), answer(plain, ids)), f"{tokens}"
    assert set(recorded._reader._passes) == {4, 12}
