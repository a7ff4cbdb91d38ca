"""Logits are those of transformers' own forward pass, whoever computes them, and likelihoods are read off them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_close, tiny_llama, word_tokenizer
from tiny import MODELS, tiny
from torch import Tensor
from transformers import PreTrainedModel

from aq_lightning.experts import run_here
from aq_lightning.models.loading import load
from aq_lightning.scoring import likelihoods as module
from aq_lightning.scoring.answers import Answers, BlockByBlock, Whole, batches
from aq_lightning.scoring.likelihoods import likelihoods

CPU = torch.device("cpu")
GROUPS = [torch.randint(3, 96, (5, 24)), torch.randint(3, 96, (3, 7))]


def saved(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon-rw", "bloom", "opt", "mixtral"])
def test_block_by_block_answers_as_the_whole_model(name: str, tmp_path: Path) -> None:
    assert name in MODELS
    model = tiny(name, torch.float32).model
    run_here(model.config)
    parts = BlockByBlock(load(str(saved(model, tmp_path))), None, CPU, "device")
    for answers in (parts, Whole(model, CPU)):
        found = list(answers.logits(GROUPS, 48))
        assert [tuple(part.shape) for part in found] == [(2, 24, 96), (2, 24, 96), (1, 24, 96), (3, 7, 96)]
        expected = [model(batch, use_cache=False).logits for windows in GROUPS for batch in batches(windows, 48)]
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(name, theirs, ours, 1e-5)
        assert (answers.vocabulary, answers.width) == (96, 64)


def by_hand(model: PreTrainedModel, context: list[int], following: list[int]) -> tuple[float, bool]:
    logs = model(torch.tensor([context + following])).logits[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(following) - 1)
    likeliest = all(int(logs[place].argmax()) == token for place, token in zip(places, following, strict=True))
    return sum(float(logs[place, token]) for place, token in zip(places, following, strict=True)), likeliest


@pytest.fixture
def answers() -> Answers:
    return Whole(tiny_llama(), CPU)


@torch.no_grad()
@pytest.mark.parametrize("kept", [2**31, 1], ids=["one pass", "a pass for each length"])
def test_likelihoods_by_hand(answers: Answers, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """Of pairs of unequal lengths, some of which share what the model reads."""
    monkeypatch.setattr(module, "_PASS", kept)
    model, pairs = tiny_llama(), [([5], [6]), ([5], [7]), ([7, 8, 9], [10, 11]), ([4] * 40, [5, 6, 7]), ([5], [6, 7])]
    likeliest = int(model(torch.tensor([[5]])).logits[0, -1].argmax())
    pairs.append(([5], [likeliest]))
    found = likelihoods(answers, pairs, longest=128, tokens=64)
    for (context, following), (value, greedy) in zip(pairs, found, strict=True):
        expected, is_greedy = by_hand(model, context, following)
        assert value == pytest.approx(expected, abs=1e-4) and greedy == is_greedy
    assert found[-1][1] and not all(greedy for _, greedy in found)


@torch.no_grad()
def test_what_is_too_long_loses_its_beginning(answers: Answers) -> None:
    (found,) = likelihoods(answers, [([1, 2, 3, 4, 5, 6], [7, 8])], longest=4)
    assert found[0] == pytest.approx(by_hand(tiny_llama(), [4, 5, 6], [7, 8])[0], abs=1e-4)


def test_equal_rows_are_read_once() -> None:
    class Counting(Whole):
        seen = 0

        def logits(self, groups: list[Tensor], tokens: int):
            self.seen += sum(len(windows) for windows in groups)
            yield from super().logits(groups, tokens)

    counting = Counting(tiny_llama(), CPU)
    likelihoods(counting, [([1, 2], [token]) for token in range(4)] + [([1, 2], [3, 4])], longest=8)
    assert counting.seen == 2, "four answers of one token, and one of two"
