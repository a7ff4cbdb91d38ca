"""Corpora and files give the text that they promise, and refuse the rest by name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from aq_lightning.data import CORPORA, PYTHON, Corpus, read
from aq_lightning.data.corpora import documents, identity
from aq_lightning.errors import RequestError

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "data"
ROWS = {"train": 6000, "validation": 1200, "test": 8}
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """No test reaches the hub; the returned function puts numbered rows in its place."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    load = datasets.load_dataset

    def refuse(path: str, *args: Any, **kwargs: Any) -> datasets.Dataset:
        assert path in ("json", "parquet"), f"a request for {path} would have gone to the hub"
        return load(path, *args, **kwargs)

    def serve(path: str, config: str | None, split: str, data_files: dict[str, str] | None, **_: Any) -> Any:
        (corpus,) = [corpus for corpus in CORPORA.values() if (corpus.path, corpus.config) == (path, config)]
        part = split.partition("[")[0]
        assert data_files is None or list(data_files) == [part]
        rows = {"other": [0] * ROWS[part], corpus.column: [f"{part} {row}" for row in range(ROWS[part])]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
        return load("parquet", data_files={part: str(tmp_path / "rows.parquet")}, split=split)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    return lambda: monkeypatch.setattr(datasets, "load_dataset", serve)


@pytest.mark.parametrize(
    ("name", "split", "part", "first", "stop", "separator"),
    [
        ("wikitext2", "calibration", "train", 0, 6000, "\n\n"),
        ("wikitext2", "evaluation", "test", 0, 8, "\n\n"),
        ("c4", "calibration", "train", 0, 5000, "\n\n"),
        ("c4", "evaluation", "validation", 0, 1100, " "),
        ("ptb", "calibration", "train", 0, 6000, "\n\n"),
        ("ptb", "evaluation", "validation", 0, 1200, "\n\n"),
        ("pile", "calibration", "train", 0, 3000, "\n\n"),
        ("pile", "evaluation", "train", 3000, 6000, "\n\n"),
    ],
)
def test_corpus_is_the_joined_column_of_its_split(
    hub: Callable[[], None], name: str, split: Any, part: str, first: int, stop: int, separator: str
) -> None:
    hub()
    assert read(name, split) == separator.join(f"{part} {row}" for row in range(first, stop))


def test_rows_of_a_split_that_the_corpus_names_no_file_for(hub: Callable[[], None]) -> None:
    hub()
    assert documents("ptb", "test", "penn_treebank/test/*.parquet") == [f"test {row}" for row in range(8)]


@pytest.mark.parametrize("corpus", CORPORA.values(), ids=CORPORA)
def test_files_are_named_for_both_splits_or_none(corpus: Corpus) -> None:
    parts = {rows.partition("[")[0] for rows in (corpus.calibration, corpus.evaluation)}
    assert set(corpus.files) in (set(), parts)


def test_offline_hub_is_a_request_error(tmp_path: Path) -> None:
    """In a fresh process, because the libraries read the variable when imported."""
    program = (
        "from aq_lightning.data import CORPORA, read\n"
        "from aq_lightning.errors import RequestError\n"
        "for name in CORPORA:\n"
        "    try: read(name, 'calibration')\n"
        "    except RequestError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split("'")[1] for line in lines] == list(CORPORA)
    assert all("could not be fetched" in line and "local file" in line for line in lines)


def test_python_reference_shares_no_paragraph_between_splits() -> None:
    calibration, evaluation = (
        {" ".join(paragraph.split()) for paragraph in read(PYTHON, split).split("\n\n")}
        for split in ("calibration", "evaluation")
    )
    assert not calibration & evaluation
    assert len(evaluation) / len(calibration | evaluation) == pytest.approx(0.2, abs=0.001)
    assert len(read(PYTHON, "calibration")) > 200_000 and len(read(PYTHON, "evaluation")) > 40_000


def test_identity_follows_whatever_the_text_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "a.json").write_text("{}")
    sources = [*CORPORA, *(f"{tmp_path}/{name}" for name in ("a.jsonl", "a.json", "a.jsonl:body"))]
    assert len({identity(source) for source in sources}) == len(sources)
    assert identity(f"{tmp_path}/a.jsonl") == identity(f"{tmp_path}/a.jsonl:text")
    before = identity(PYTHON)
    monkeypatch.setattr("platform.python_version", lambda: "4.0.0")
    assert identity(PYTHON) != before


@pytest.mark.parametrize("source", ["wikitext", "Salesforce/wikitext", "no/such/file.txt", "file.jsonl:text", "", "."])
def test_unknown_source_is_refused_without_the_network(source: str) -> None:
    for request in (lambda: read(source, "calibration"), lambda: identity(source)):
        with pytest.raises(RequestError, match="python, wikitext2, c4, ptb, pile.*\\.jsonl"):
            request()


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", b"one\r\n\n two\n", "one\r\n\n two\n"),
        ("a.MD", "# é\n".encode(), "# é\n"),
        ("a.raw", b" \n = T = \n\nbody\nlast", "\n\n = T = \n\n\n\n\nbody\n\n\nlast\n"),
        ("a.raw", "one\u2028line\x85\n".encode(), "one\u2028line\x85\n"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y\\n"}\n', "x\n\ny\n"),
        ("a.jsonl:body", b'{"body": "x", "text": 1}\n{"body": "", "text": 2}\n', "x\n\n"),
        ("a.json", b'[{"text": "x"}, {"text": "y"}]', "x\n\ny"),
        ("[a]*:b.jsonl", b'{"text": "x"}', "x"),
    ],
)
def test_file_is_read_whole_in_its_form(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name.removesuffix(":body")).write_bytes(content)
    assert read(str(tmp_path / name), "calibration") == read(str(tmp_path / name), "evaluation") == text


def test_parquet_documents_are_joined(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": ["x", "y"]}).to_parquet(tmp_path / "a.parquet")
    assert read(f"{tmp_path}/a.parquet:body", "calibration") == "x\n\ny"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text", r"ends in .*\.jsonl.*got '.*a\.csv'"),
        ("a.txt:text", b"text", "Only .* have columns.*leave out ':text'"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.txt", b" \n", "empty"),
        ("a.jsonl", b"", "empty"),
        ("a.parquet", b"", "empty"),
        ("a.jsonl", b"\n\n", "no data"),
        ("a.jsonl", b'{"text": "x"}\n{x\n', "rows with columns.*JSON parse error"),
        ("a.jsonl", b'{"text": "\xff"}\n', "rows with columns.*utf-8"),
        ("a.parquet", b"PAR1", "rows with columns.*[Pp]arquet"),
        ("a.jsonl:body", b'{"text": "x", "id": 1}\n', "got 'body'.*has text, id"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', "got None in 'text', row 1"),
        ("a.jsonl", b'{"text": 7}\n', "got 7 in 'text', row 0"),
    ],
)
def test_file_without_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name.partition(":")[0]).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read(str(tmp_path / name), "evaluation")


@needs_shared
def test_wikitext_file_follows_the_protocol_of_the_papers() -> None:
    path = SHARED / "wikitext2" / "wiki.test.raw"
    text = read(str(path), "evaluation")
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")
    with path.open(encoding="utf-8") as lines:
        rows = ["" if not line.strip() else line for line in lines]
    assert len(rows) == 4358  # as on the hub
    assert text == "\n\n".join(rows)


@needs_shared
def test_column_is_chosen_by_suffix() -> None:
    path = SHARED / "c4_sample" / "c4.jsonl"
    assert read(f"{path}:prefix", "calibration") != read(f"{path}:gold_completion", "calibration")
    with pytest.raises(RequestError, match="prefix, gold_completion"):
        read(str(path), "calibration")
