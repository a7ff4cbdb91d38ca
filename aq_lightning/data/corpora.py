"""Names of text to text: published corpora, the embedded default, the user's own files."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Literal

import datasets
from huggingface_hub.errors import HTTPError

from aq_lightning.data.files import SUFFIXES, TextFile
from aq_lightning.errors import RequestError

Split = Literal["calibration", "evaluation"]

PYTHON = "python"
"""The embedded default: the Python language reference that every interpreter carries, about 350 kB of English."""

_PARAGRAPH = "\n\n"
# A hub that is offline, unreachable, or without the data set; all other refusals are of httpx.
_UNFETCHED = (ConnectionError, FileNotFoundError, TimeoutError, HTTPError)


@dataclass(frozen=True)
class Corpus:
    """A data set of the Hugging Face hub and the text that is read from it."""

    path: str
    """Owner and name on the hub."""
    calibration: str
    """Split to calibrate on, as ``datasets`` writes it: ``train``, ``train[:1000]``, ``train[50%:]``."""
    evaluation: str
    """Split to evaluate on; shares no row with the other."""
    config: str | None = None
    """Configuration of the data set, where it has several."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Split name → file in the repository, where not everything is wanted."""
    revision: str | None = None
    """Branch of the repository; None: main."""
    column: str = "text"
    """Column that holds the text."""
    separators: Mapping[Split, str] = field(default_factory=dict)
    """What stands between two rows, where that is not an empty line."""


CORPORA: dict[str, Corpus] = {
    "wikitext2": Corpus("Salesforce/wikitext", "train", "test", config="wikitext-2-raw-v1"),
    # Evaluation is the "c4-new" of GPTQ: the first 1,100 documents, joined with spaces (its first 256 windows of 2048).
    # Calibration takes the head of the first shard, about as many tokens as the train split of WikiText-2.
    "c4": Corpus(
        "allenai/c4",
        "train[:5000]",
        "validation[:1100]",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        separators={"evaluation": " "},
    ),
    # Main holds a loading script, which datasets >= 4 refuses; the hub keeps its own conversion on another branch.
    "ptb": Corpus(
        "ptb-text-only/ptb_text_only",
        "train",
        "validation",
        files={"train": "penn_treebank/train/*.parquet", "validation": "penn_treebank/validation/*.parquet"},
        revision="refs/convert/parquet",
        column="sentence",
    ),
    # 10,000 documents in 33 MB; the validation split that papers use is 471 MB and needs zstandard.
    "pile": Corpus("NeelNanda/pile-10k", "train[:50%]", "train[50%:]"),
}


def is_file(source: str) -> bool:
    """Whether ``source`` names a user's file, existing or not, rather than a corpus."""
    return source != PYTHON and source not in CORPORA


def calibration_share(count: int) -> int:
    """How many of ``count`` items, the first, are for calibration where one text serves both parts: 80 %."""
    return count * 8 // 10


def read(source: str, split: Split) -> str:
    """The text of a corpus, or of a user's file.

    Args:
        source: ``python``, a name in :data:`CORPORA`, or the path of a file as :class:`TextFile` reads it.
        split: which part of a corpus; a file is read whole, whichever is asked for.

    Raises:
        RequestError: no such corpus or file, a file that holds no text, or a data set that cannot be fetched.
    """
    if source == PYTHON:
        text = _python(split)
    elif source in CORPORA:
        text = _fetch(source, split)
    else:
        text = _file(source).read()
    if not text.strip():
        raise RequestError(f"A source holds text, got {source!r}, which is empty: name another.")
    return text


def identity(source: str) -> str:
    """What the text of ``source`` depends on: the content of a file, else the name of the corpus.

    Raises:
        RequestError: no such corpus or file.
    """
    if source == PYTHON:
        return f"{PYTHON} {platform.python_version()}"
    return source if source in CORPORA else _file(source).identity


def _python(split: Split) -> str:
    unique: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split(_PARAGRAPH):
            # Topics quote one another, at times indented: a paragraph is known by its words.
            unique.setdefault(" ".join(paragraph.split()), paragraph.strip("\n"))
    unique.pop("", None)
    ordered = list(unique.values())
    cut = calibration_share(len(ordered))
    return _PARAGRAPH.join(ordered[:cut] if split == "calibration" else ordered[cut:])


def documents(name: str, rows: str, file: str | None = None) -> list[str]:
    """Rows of a corpus, from the Hugging Face hub.

    Args:
        name: in :data:`CORPORA`.
        rows: split as ``datasets`` writes it.
        file: of the repository, where the corpus names none for that split.

    Raises:
        RequestError: the data set cannot be fetched.
    """
    corpus, part = CORPORA[name], rows.partition("[")[0]
    file = file or corpus.files.get(part)
    try:
        dataset = datasets.load_dataset(
            corpus.path,
            corpus.config,
            data_files={part: file} if file else None,
            revision=corpus.revision,
            split=rows,
            # The data set's card counts the rows of all files, not of the one that is read.
            verification_mode="no_checks" if file else None,
        )
    except _UNFETCHED as error:
        raise RequestError(
            f"The data set {name!r} ({corpus.path}) could not be fetched from the Hugging Face hub ({error}): "
            f"connect, or name a local file, or {PYTHON!r}, which needs no network."
        ) from error
    return dataset[corpus.column][:]


def _fetch(name: str, split: Split) -> str:
    corpus = CORPORA[name]
    rows = corpus.calibration if split == "calibration" else corpus.evaluation
    return corpus.separators.get(split, _PARAGRAPH).join(documents(name, rows))


def _file(source: str) -> TextFile:
    file = TextFile.find(source)
    if file is None:
        raise RequestError(
            f"A source is the name of a corpus or an existing file of text, got {source!r}, which is neither: "
            f"use {', '.join((PYTHON, *CORPORA))}, or the path of a file ending in {', '.join(SUFFIXES)}."
        )
    return file
