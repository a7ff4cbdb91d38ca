"""What a model writes is drawn from it, goes on from the windows given, and is the same for the same seed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import tiny_llama
from torch import Tensor

from aq_lightning.calibration import Streams, written_windows
from aq_lightning.models.llama import SPEC
from aq_lightning.models.loading import Pretrained, Source
from aq_lightning.recipe import StreamStorage

CPU = torch.device("cpu")
GIVEN = torch.randint(3, 96, (4, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Pretrained:
    """One that has an opinion about the next token."""
    made = tiny_llama().requires_grad_(False)
    made.lm_head.weight *= 8
    return Pretrained(Source("random"), made, None, SPEC)


def likelihood(model: Pretrained, tokens: Tensor) -> tuple[float, float]:
    """Mean log-likelihood of tokens given those before them, and what it would be of tokens drawn there."""
    logs = model.model(tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    found = logs.gather(-1, tokens[:, 1:, None])[..., 0]
    return float(found[:, 15:].mean()), float((logs.exp() * logs).sum(-1)[:, 15:].mean())


def test_windows_are_drawn_from_the_model(model: Pretrained) -> None:
    write = partial(written_windows, model, GIVEN, 48, 32)
    tokens = write(1, CPU)
    assert tokens.shape == (48, 40) and tokens.dtype == torch.int64
    assert torch.equal(write(1, CPU), tokens) and not torch.equal(write(2, CPU), tokens)
    found, expected = likelihood(model, tokens)
    assert found == pytest.approx(expected, abs=0.15) and expected < -0.5, "at temperature 1, of all tokens"
    assert likelihood(model, torch.randint(96, (48, 40)))[0] < found - 1, "the control"
    state = torch.get_rng_state()
    write(3, CPU)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's numbers depend on it"


def test_texts_begin_in_the_windows(model: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of 20 tokens to a window of 40, each from another window; the third is cut off."""
    monkeypatch.setattr("aq_lightning.calibration.written._TEXT", 18)
    tokens = written_windows(model, GIVEN, 2, 4, 0, CPU)
    assert tokens.shape == (2, 40)
    pieces = [{tuple(piece) for piece in row.unfold(0, 4, 1).tolist()} for row in GIVEN]
    for text in range(6):
        row, start = divmod(text, 3)
        beginning = tuple(tokens[row, 18 * start : 18 * start + 4].tolist())
        assert beginning in pieces[text % 4], text


def test_windows_shorter_than_a_beginning(model: Pretrained) -> None:
    tokens = written_windows(model, GIVEN[:, :8], 3, 4, 0, CPU)
    assert tokens.shape == (3, 8)


def test_streams_of_what_is_written() -> None:
    stream = torch.arange(24.0).view(6, 2, 2)
    streams = Streams.entering(stream, 4)
    assert torch.equal(streams.full, stream[:4]) and torch.equal(streams.written, stream[4:])
    assert torch.equal(streams.all_full(StreamStorage("float32"), CPU), stream)
    assert streams.tensors().keys() == {"full", "quantized", "written"}
    alone = Streams.entering(stream, 6)
    assert alone.tensors().keys() == {"full", "quantized"} and alone.all_full(StreamStorage(), CPU) is alone.full
