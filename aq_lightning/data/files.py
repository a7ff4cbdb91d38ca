"""A user's own files of text."""

from __future__ import annotations

import glob
import hashlib
from dataclasses import dataclass
from pathlib import Path

import datasets

from aq_lightning.errors import RequestError

_PLAIN, _WIKITEXT, _DOCUMENTS = (".txt", ".md"), (".raw",), (".jsonl", ".json", ".parquet")
SUFFIXES = (*_PLAIN, *_WIKITEXT, *_DOCUMENTS)
"""Of the files that can be read."""

# Rows of unequal shape; bytes that are not UTF-8, not parquet, or hold no row (all of them ValueErrors).
_UNREADABLE = (datasets.exceptions.DatasetGenerationError, ValueError)


@dataclass(frozen=True)
class TextFile:
    """An existing file of text, and how to read it."""

    path: Path
    """``.txt`` and ``.md`` are read as they are; ``.raw`` in the row form of WikiText; the others are documents."""
    column: str | None = None
    """Column of the documents; None: ``text``."""

    def __post_init__(self) -> None:
        if self.suffix not in SUFFIXES:
            raise RequestError(f"A file of text ends in {', '.join(SUFFIXES)}, got {str(self.path)!r}: convert it.")
        if self.column is not None and self.suffix not in _DOCUMENTS:
            raise RequestError(
                f"Only {', '.join(_DOCUMENTS)} files have columns, got {f'{self.path}:{self.column}'!r}: "
                f"leave out ':{self.column}'."
            )

    @classmethod
    def find(cls, source: str) -> TextFile | None:
        """The file named ``FILE`` or ``FILE:COLUMN``; None where there is none.

        Raises:
            RequestError: a suffix that cannot be read, or a column of a file that has none.
        """
        path = Path(source).expanduser()
        if path.is_file():
            return cls(path)
        stem, _, column = source.rpartition(":")
        path = Path(stem).expanduser()
        return cls(path, column) if path.is_file() else None

    @property
    def suffix(self) -> str:
        """In lower case, with its dot."""
        return self.path.suffix.lower()

    @property
    def identity(self) -> str:
        """What the text depends on: the bytes (their sha256), and the suffix and column by which they are read."""
        return f"{hashlib.sha256(self.path.read_bytes()).hexdigest()}{self.suffix}:{self.column or 'text'}"

    def read(self) -> str:
        """The whole text; documents are joined with empty lines.

        Raises:
            RequestError: the bytes are no UTF-8 or no rows, or the column is missing or holds something else.
        """
        if self.suffix in _DOCUMENTS:
            return "\n\n".join(self._documents())
        try:
            text = self.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"A file of text is in UTF-8, got {str(self.path)!r} ({error}): convert it.") from error
        return _wikitext(text) if self.suffix in _WIKITEXT else text

    def _documents(self) -> list[str]:
        name, column = str(self.path), self.column or "text"
        if not self.path.stat().st_size:
            return []
        kind = "parquet" if self.suffix == ".parquet" else "json"
        try:
            dataset = datasets.load_dataset(kind, data_files=glob.escape(name), split="train")
            documents: list[str] | None = dataset[column][:] if column in dataset.column_names else None
        except _UNREADABLE as error:
            raise RequestError(
                f"A {self.suffix} file holds rows with columns, got {name!r} ({error.__cause__ or error}): mend it."
            ) from error
        if documents is None:
            raise RequestError(
                f"The text is a column of the file, got {column!r}, but {name!r} has "
                f"{', '.join(dataset.column_names)}: name one of them as FILE:COLUMN."
            )
        for row, document in enumerate(documents):
            if not isinstance(document, str):
                raise RequestError(
                    f"Every row of a column of text is text, got {document!r} in {column!r}, row {row} of {name!r}: "
                    "name another column as FILE:COLUMN, or leave that row out."
                )
        return documents


def _wikitext(text: str) -> str:
    """What the papers read from WikiText: a blank line is an empty row, any other keeps its newline."""
    rows = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    return "\n\n".join(f"{row}\n" if row.strip() else "" for row in rows)
