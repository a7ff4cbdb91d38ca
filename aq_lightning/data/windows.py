"""Windows of tokens: what calibration and evaluation see of a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from aq_lightning.data.cache import cache_directory, cached
from aq_lightning.data.corpora import Split, calibration_share, identity, is_file, read
from aq_lightning.data.files import TextFile
from aq_lightning.data.tokens import fingerprint, tokenize
from aq_lightning.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VERSION = 1
"""Of what is cached; raised when the same key would give other windows."""


def calibration_windows(tokens: Tensor, count: int, length: int, seed: int) -> Tensor:
    """Random crops, as the papers take them: offsets uniform over the text, distinct where there are enough.

    Args:
        tokens: int64 (tokens,).
        count: number of crops.
        length: tokens of each.
        seed: of the offsets.

    Returns:
        int64 (count, length).

    Raises:
        RequestError: fewer than ``length + 1`` tokens (the papers' crops leave each its next token).
    """
    offsets = len(tokens) - length
    if offsets < 1:
        raise RequestError(
            f"A calibration window of {length} tokens needs a text of at least {length + 1}, got {len(tokens)}: "
            "use a longer text, or lower the length."
        )
    generator = torch.Generator().manual_seed(seed)
    if offsets < count:
        chosen = torch.randint(offsets, (count,), generator=generator)
    else:
        chosen = torch.randperm(offsets, generator=generator)[:count]
    return tokens.unfold(0, length, 1)[chosen]


def evaluation_windows(tokens: Tensor, length: int, limit: int | None = None) -> Tensor:
    """Consecutive whole windows from the start; the tail that fills none is dropped.

    Args:
        tokens: int64 (tokens,).
        length: tokens of each window.
        limit: keep at most that many windows; None: all.

    Returns:
        int64 (windows, length).

    Raises:
        RequestError: fewer than ``length`` tokens.
    """
    whole = len(tokens) // length
    if whole == 0:
        raise RequestError(
            f"An evaluation window of {length} tokens needs a text of at least as many, got {len(tokens)}: "
            "use a longer text, or lower the evaluation length."
        )
    count = whole if limit is None else min(limit, whole)
    return tokens[: count * length].view(count, length).clone()


def check_windows(windows: Tensor, vocabulary: int) -> None:
    """
    Raises:
        RequestError: these are no windows of tokens of a model with so many.
    """
    if windows.dtype != torch.int64 or windows.ndim != 2 or windows.numel() == 0:
        raise RequestError(
            "Calibration windows are int64 of shape (samples, length), got "
            f"{windows.dtype} of shape {tuple(windows.shape)}: tokenize the text again."
        )
    least, most = int(windows.min()), int(windows.max())
    if least < 0 or most >= vocabulary:
        raise RequestError(
            f"Tokens lie in [0, {vocabulary}), the model's vocabulary, got {least} to {most}: use its own tokenizer."
        )


class TokenWindows(LightningDataModule):
    """Windows to calibrate and to evaluate on, tokenized once and cached on disk.

    Calibration and evaluation never share text: a corpus has a split for each, and a file that serves both is cut,
    its first 80 % of tokens for calibration and its last 20 % for evaluation.

    Args:
        pretrained: directory or hub id of the model whose tokenizer is used.
        source: ``python`` (embedded), ``wikitext2``, ``c4``, ``ptb``, ``pile``, or a file: ``.txt``, ``.md``,
            ``.raw`` (WikiText), ``.jsonl``, ``.json``, ``.parquet``, with ``FILE:COLUMN`` for a column not named text.
        evaluation: the same, for evaluation; null: the other part of ``source``.
        samples: calibration windows.
        length: tokens of a calibration window.
        evaluation_samples: evaluation windows, from the start of the text; null: all.
        evaluation_length: tokens of an evaluation window; null: as in calibration.
        batch_size: windows in an evaluation step.
        seed: of the calibration windows' places in the text.
        cache_dir: directory of the cache; null: ``$AQ_LIGHTNING_CACHE``, else ``~/.cache/aq_lightning``.
    """

    def __init__(
        self,
        pretrained: str = "",
        source: str = "python",
        evaluation: str | None = None,
        samples: int = 128,
        length: int = 2048,
        evaluation_samples: int | None = None,
        evaluation_length: int | None = None,
        batch_size: int = 1,
        seed: int = 42,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        _check_positive(samples=samples, length=length, batch_size=batch_size)
        _check_positive(evaluation_samples=evaluation_samples, evaluation_length=evaluation_length)
        self._sources: dict[Split, str] = {"calibration": source, "evaluation": evaluation or source}
        # One file for both parts is cut; two sources are each read whole.
        self._cut = not evaluation and is_file(source)
        self._pretrained = pretrained
        self._samples = samples
        self._length = length
        self.evaluation_samples = evaluation_samples
        self.evaluation_length = evaluation_length or length
        self._batch_size = batch_size
        self.seed = seed
        self._directory = cache_directory(cache_dir) / "windows"
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._read: dict[Split, Tensor] = {}

    def attach_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Gives the tokenizer of the model; needed before any window is asked for."""
        self._tokenizer = tokenizer
        self._read = {}

    @property
    def calibration_shape(self) -> tuple[int, int]:
        """Samples and length, before any text is read."""
        return self._samples, self._length

    @property
    def evaluation_source(self) -> str:
        """Name of the text that is evaluated on."""
        return self._sources["evaluation"]

    @property
    def evaluation_tokens(self) -> int:
        """Read in an evaluation step."""
        return self._batch_size * self.evaluation_length

    def calibration(self) -> Tensor:
        """Calibration windows, int64 (samples, length).

        Raises:
            RequestError: no tokenizer is attached, the source cannot be read, its text is too short, or it is the
                evaluation file under a second name.
        """
        return self._windows(
            "calibration",
            {"count": self._samples, "length": self._length, "seed": self.seed},
            lambda tokens: calibration_windows(tokens, self._samples, self._length, self.seed),
        )

    def evaluation(self) -> Tensor:
        """Evaluation windows, int64 (windows, evaluation_length).

        Raises:
            RequestError: no tokenizer is attached, the source cannot be read, its text is too short, or it is the
                calibration file under a second name.
        """
        return self._windows(
            "evaluation",
            {"count": self.evaluation_samples or "all", "length": self.evaluation_length, "seed": "none"},
            lambda tokens: evaluation_windows(tokens, self.evaluation_length, self.evaluation_samples),
        )

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Batches of evaluation windows in the order of the text, int64 (up to batch_size, evaluation_length)."""
        return DataLoader(self.evaluation(), batch_size=self._batch_size, shuffle=False, num_workers=0)

    def _windows(self, split: Split, shape: Mapping[str, str | int], cut: Callable[[Tensor], Tensor]) -> Tensor:
        """Windows of one split, once read for good: a source may vanish during a run."""
        if split not in self._read:
            self._read[split] = self._cached(split, shape, cut)
        return self._read[split]

    def _cached(self, split: Split, shape: Mapping[str, str | int], cut: Callable[[Tensor], Tensor]) -> Tensor:
        """Windows of one split from the cache, or ``cut`` from its tokens."""
        if self._tokenizer is None:
            raise RequestError("Windows are made of tokens, got no tokenizer: call attach_tokenizer(tokenizer) first.")
        self._check_apart()
        key = {
            "version": _VERSION,
            "tokenizer": fingerprint(self._tokenizer),
            "pretrained": self._pretrained,
            "data": identity(self._sources[split]),
            "split": f"{split} of one file" if self._cut else split,
            **shape,
        }
        return cached(key, self._directory, lambda: cut(self._tokens(split)))

    def _tokens(self, split: Split) -> Tensor:
        tokens = tokenize(self._tokenizer, read(self._sources[split], split))
        if not self._cut:
            return tokens
        first = calibration_share(len(tokens))
        return tokens[:first] if split == "calibration" else tokens[first:]

    def _check_apart(self) -> None:
        files = [TextFile.find(source) for source in self._sources.values() if is_file(source)]
        identities = [file.identity for file in files if file is not None]
        if not self._cut and len(set(identities)) < len(identities):
            raise RequestError(
                f"Evaluation text is not calibration text, got the same content in {self._sources['calibration']!r} "
                f"and {self._sources['evaluation']!r}: leave data.evaluation unset to cut one file, or name another."
            )


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise RequestError(f"data.{name} is at least 1, got {value}: raise it.")
