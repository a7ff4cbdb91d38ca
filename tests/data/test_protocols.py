"""Protocols cut the rows that they name as the papers' code does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from helpers import word_tokenizer
from torch import Tensor

from aq_lightning.data import PROTOCOLS, protocol_windows, protocols
from aq_lightning.data.protocols import crops
from aq_lightning.errors import RequestError

TOKENIZER = word_tokenizer()


def sentence(number: int, length: int) -> str:
    return " ".join(f"word{(number * 31 + place) % 90}" for place in range(length))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What would have gone to the hub, which answers with 40 documents of 5 to 44 words."""
    calls: list[tuple] = []

    def documents(*request: object) -> list[str]:
        calls.append(request)
        return [sentence(number, 5 + number) for number in range(40)]

    monkeypatch.setattr(protocols, "documents", documents)
    return calls


@pytest.mark.parametrize(
    "name, request_, separator",
    [
        ("wikitext2", ("wikitext2", "test", None), "\n\n"),
        ("ptb-old", ("ptb", "validation", None), "\n\n"),
        ("ptb-new", ("ptb", "test", "penn_treebank/test/*.parquet"), " "),
        ("c4-new", ("c4", "validation[:1100]", None), " "),
    ],
)
def test_consecutive_windows(asked: list[tuple], name: str, request_: tuple, separator: str) -> None:
    found = protocol_windows(name, TOKENIZER, 32)
    assert asked == [request_]
    assert PROTOCOLS[name].separator == separator
    every = torch.tensor(TOKENIZER(separator.join(sentence(n, 5 + n) for n in range(40)))["input_ids"])
    assert torch.equal(found.flatten(), every[: len(every) // 32 * 32])
    assert torch.equal(protocol_windows(name, TOKENIZER, 32, 3), found[:3])


def test_c4_takes_256_windows_at_most(asked: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "_CROPS", 256)
    assert len(protocol_windows("c4-old", TOKENIZER, 32)) == 256 and PROTOCOLS["c4-new"].windows == 256
    assert asked == [("c4", "validation", None)]


def published(rows: list[list[int]], length: int, count: int) -> list[list[int]]:
    """The loop of GPTQ's get_c4 in its order of draws."""
    random.seed(0)
    found = []
    for _ in range(count):
        while True:
            row = rows[random.randint(0, len(rows) - 1)]
            if len(row) > length:
                break
        start = random.randint(0, len(row) - length - 1)
        found.append(row[start : start + length])
    return found


def test_crops_are_those_of_the_published_code() -> None:
    texts = [sentence(number, 5 + number) for number in range(40)]

    def tokens(text: str) -> Tensor:
        return torch.tensor(TOKENIZER(text)["input_ids"])

    state = random.getstate()
    found = crops(texts, tokens, 30, 50)
    assert random.getstate() == state, "the process's own generator is left alone"
    assert found.tolist() == published([tokens(text).tolist() for text in texts], 30, 50)
    with pytest.raises(RequestError, match="longer document"):
        crops(texts, tokens, 44, 1)


def test_names_that_leave_a_variant_open_are_refused() -> None:
    with pytest.raises(RequestError, match="c4-old or c4-new"):
        protocol_windows("c4", TOKENIZER, 32)
    with pytest.raises(RequestError, match="ptb-old or ptb-new"):
        protocol_windows("ptb", TOKENIZER, 32)
    with pytest.raises(RequestError, match="existing file of text, got 'wikitext3'"):
        protocol_windows("wikitext3", TOKENIZER, 32)


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(sentence(3, 100))
    found = protocol_windows(str(tmp_path / "mine.txt"), TOKENIZER, 32)
    assert found.flatten().tolist() == TOKENIZER(sentence(3, 96))["input_ids"]
