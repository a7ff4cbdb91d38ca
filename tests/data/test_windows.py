"""Windows are slices of the text, and calibration never sees the text of evaluation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from aq_lightning.data import TokenWindows, calibration_windows, evaluation_windows, read, windows
from aq_lightning.errors import RequestError

WORDS = [f"word{number}" for number in range(1000)]
SMALL: dict[str, Any] = {"samples": 4, "length": 16}


def _tokenizer(extra: int = 0) -> PreTrainedTokenizerFast:
    """Word-level, one token a word; adds <s> in front where special tokens are asked for; context of 8 tokens."""
    words = ["<unk>", "<s>", *WORDS, *map(str, range(extra))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", model_max_length=8)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer()


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A file of 1,000 different words."""
    (tmp_path / "book.txt").write_text(" ".join(WORDS))
    return tmp_path / "book.txt"


@pytest.fixture
def make(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Data with a cache of its own and the tokenizer attached."""

    def build(attached: PreTrainedTokenizerFast = tokenizer, **arguments: Any) -> TokenWindows:
        data = TokenWindows(**{"cache_dir": str(tmp_path / "cache")} | SMALL | arguments)
        data.attach_tokenizer(attached)
        return data

    return build


@given(total=st.integers(2, 300), length=st.integers(1, 40), count=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_calibration_windows_are_seeded_slices(total: int, length: int, count: int, seed: int) -> None:
    tokens = torch.arange(total) + 7
    if total < length + 1:
        with pytest.raises(RequestError, match=f"at least {length + 1}, got {total}"):
            calibration_windows(tokens, count, length, seed)
        return
    crops = calibration_windows(tokens, count, length, seed)
    starts = crops[:, 0] - 7
    assert crops.shape == (count, length) and crops.dtype == torch.int64
    assert torch.equal(crops, tokens[starts[:, None] + torch.arange(length)])
    assert starts.max() + length < total  # each crop's next token exists
    assert total - length < count or len(starts.unique()) == count
    assert torch.equal(crops, calibration_windows(tokens, count, length, seed))


def test_calibration_windows_reach_the_whole_text_and_vary_with_the_seed() -> None:
    crops = [calibration_windows(torch.arange(100), 90, 10, seed)[:, 0].tolist() for seed in (0, 1)]
    assert set(crops[0]) == set(range(90)) and crops[0] != crops[1]


@given(total=st.integers(0, 300), length=st.integers(1, 40), limit=st.none() | st.integers(1, 10))
def test_evaluation_windows_are_the_head_of_the_text_in_order(total: int, length: int, limit: int | None) -> None:
    tokens = torch.arange(total)
    if total < length:
        with pytest.raises(RequestError, match=f"got {total}"):
            evaluation_windows(tokens, length, limit)
        return
    cuts = evaluation_windows(tokens, length, limit)
    assert len(cuts) == min(total // length, limit or total)
    assert torch.equal(cuts.flatten(), tokens[: len(cuts) * length])


def test_text_is_tokenized_whole_without_special_tokens(
    make: Any, book: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    data = make(source="python", evaluation=str(book), evaluation_length=1000)
    with caplog.at_level(logging.WARNING):
        (window,) = data.evaluation()
    assert tokenizer.decode(window) == book.read_text()
    assert not caplog.records and len(book.read_text().split()) > tokenizer.model_max_length


def test_one_file_is_cut_in_two(make: Any, book: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = make(source=str(book), samples=500, length=10)
    first, second = (set(tokenizer.convert_ids_to_tokens(x.flatten())) for x in (data.calibration(), data.evaluation()))
    assert first <= set(WORDS[:800]) and second == set(WORDS[800:])


def test_two_files_are_read_whole(make: Any, book: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "other.txt").write_text(" ".join(reversed(WORDS)))
    data = make(source=str(book), evaluation=str(tmp_path / "other.txt"), samples=990, length=10)
    assert tokenizer.decode(data.evaluation().flatten()).split() == WORDS[::-1]
    assert len(data.calibration().unique()) == 999


def test_named_corpus_uses_its_own_splits(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(windows, "read", lambda source, split: asked.append((source, split)) or read(source, split))
    data = make(evaluation="python")
    data.calibration(), data.evaluation()
    assert asked == [("python", "calibration"), ("python", "evaluation")]


def test_calibration_file_is_refused_for_evaluation(make: Any, book: Path) -> None:
    copy = book.with_name("copy.txt")
    copy.write_bytes(book.read_bytes())
    data = make(source=str(book), evaluation=str(copy))
    for request in (data.calibration, data.evaluation):
        with pytest.raises(RequestError, match="is not calibration text.*leave data.evaluation unset"):
            request()


def test_windows_before_the_tokenizer_are_refused() -> None:
    for request in (TokenWindows().calibration, TokenWindows().test_dataloader):
        with pytest.raises(RequestError, match="attach_tokenizer"):
            request()


@pytest.mark.parametrize("name", ["samples", "length", "evaluation_samples", "evaluation_length", "batch_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_are_positive(name: str, value: int) -> None:
    with pytest.raises(RequestError, match=f"data.{name} is at least 1, got {value}"):
        TokenWindows(**{name: value})


CHANGES: list[dict[str, Any]] = [
    {"attached": _tokenizer(extra=1)},
    {"pretrained": "other"},
    {"evaluation": "other.txt"},
    *({"source": source} for source in ("other.txt", "book.raw", "python")),
    *({name: 17} for name in ("seed", "length", "samples")),
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_whatever_windows_depend_on_is_in_their_cache_key(
    make: Any, book: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    def files() -> int:
        return len(list(Path("cache/windows").iterdir()))

    monkeypatch.chdir(book.parent)
    Path("other.txt").write_text(" ".join(WORDS[::-1]))
    Path("book.raw").write_bytes(book.read_bytes())
    for unrelated in ({}, {"evaluation_length": 99, "evaluation_samples": 9, "batch_size": 3}):
        make(source="book.txt", **unrelated).calibration()
    assert files() == 1
    make(**{"source": "book.txt"} | change).calibration()
    assert files() == 2
    for unrelated in ({}, {"seed": 43, "samples": 9}):
        make(source="book.txt", **unrelated).evaluation()
    assert files() == 3
    monkeypatch.setattr(windows, "_VERSION", 0)
    make(source="book.txt").calibration()
    assert files() == 4


def test_renamed_file_and_used_tokenizer_hit_the_cache(
    make: Any, book: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = _tokenizer()
    first = make(fresh, source=str(book)).calibration()
    fresh(["word1 word2"], truncation=True, max_length=1)
    monkeypatch.setattr(windows, "tokenize", lambda *_: pytest.fail("tokenized twice"))
    assert torch.equal(make(fresh, source=str(book.rename(book.with_name("moved.txt")))).calibration(), first)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")
def test_trainer_tests_every_evaluation_window_in_order(make: Any, book: Path) -> None:
    seen: list[Tensor] = []

    class Watch(BoringModel):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            seen.append(batch)

    data = make(source=str(book), length=20, batch_size=4)
    quiet: dict[str, Any] = {name: False for name in ("logger", "enable_progress_bar", "enable_checkpointing")}
    Trainer(accelerator="cpu", devices=1, **quiet).test(Watch(), data, verbose=False)
    assert [tuple(batch.shape) for batch in seen] == [(4, 20), (4, 20), (2, 20)]
    assert torch.equal(torch.cat(seen), data.evaluation()) and seen[0].dtype == torch.int64
