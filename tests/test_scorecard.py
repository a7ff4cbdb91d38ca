"""``test`` on the command line: several models, texts and questions in one table, with JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from aq_lightning.cli import main


@pytest.fixture(scope="module")
def quantized(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of 4 and of 2 bits."""
    root = tmp_path_factory.mktemp("runs")
    return [fit(scheme, root / scheme, config="rtn.yaml") / "checkpoint" for scheme in ("w4a16g32", "w2a16g32")]


@pytest.fixture
def table(tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[str, dict]]:
    def run(*arguments: str) -> tuple[str, dict]:
        capsys.readouterr()
        sizes = ["--data.length=32", f"--data.source={text_file}", "--trainer.accelerator=cpu"]
        main(["test", *sizes, *map(str, arguments), f"--out={tmp_path / 'scored'}"])
        return capsys.readouterr().out, json.loads((tmp_path / "scored/test.json").read_text())

    return run


def test_models_side_by_side(table, model_directory: Path, quantized: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"word{number * 7 % 90}" for number in range(200)))
    text, found = table("--compare", model_directory, *quantized, "--perplexity", other, "--reference", model_directory)
    full, four, two = found["rows"]
    assert [row["model"] for row in found["rows"]] == [str(model_directory), *map(str, quantized)]
    assert all(set(row["scores"]) == {"other.txt", "KL", "top-1"} for row in found["rows"])
    assert full["bits"] == 16 > four["bits"] > two["bits"]
    assert 0 == full["scores"]["KL"]["value"] < four["scores"]["KL"]["value"] < two["scores"]["KL"]["value"]
    difference = found["differences"][1]["scores"]["other.txt"]
    assert difference["value"] == pytest.approx(two["perplexity"] - full["perplexity"])
    assert f"{two['perplexity']:.2f} ± {two['scores']['other.txt']['error']:.2f}" in text
    assert f"{difference['value']:+.2f} ± {difference['error']:.2f}" in text


def test_a_score_is_that_of_the_run(table, quantized: list[Path]) -> None:
    _, found = table(f"--model.pretrained={quantized[0]}")
    rows = json.loads((quantized[0].parent / "results.json").read_text())["rows"]
    assert found["rows"][0]["perplexity"] == rows[-1]["perplexity"] and list(found["rows"][0]["scores"]) == ["book.txt"]
    assert found["rows"][0]["reader"] == "transformers" and found["differences"] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_questions_of_a_file(table, model_directory: Path, quantized: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval, an optional extra, is not installed")
    rows = [
        {"goal": f"word{n}", "sol1": f"word{2 * n}", "sol2": f"word{n + 40} word3", "label": n % 2} for n in range(1, 9)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = ["--perplexity=none", "--tasks", f"mine={tmp_path / 'mine.jsonl'}"]
    text, found = table("--compare", model_directory, quantized[1], *tasks, "--questions=6")
    assert all(set(row["scores"]) == {"mine acc", "mine acc_norm"} for row in found["rows"])
    assert found["rows"][0]["scores"]["mine acc"]["units"] == 6 and "mine acc_norm" in text
    assert "perplexity" not in found["rows"][0]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--perplexity", "none"], "leaves tasks to be scored"),
        (["--perplexity", "none", "x.txt"], "stands alone"),
        (["--perplexity", "c4"], "c4-old or c4-new"),
        (["--compare", "a", "a"], "names each model once"),
        (["--questions", "0"], "from 1, got 0"),
        (["--shots", "-1"], "from 0, got -1"),
        (["--loader", "vllm"], "vllm"),
        (["--tasks", "mine=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_refusals(
    table, model_directory: Path, capsys: pytest.CaptureFixture, tmp_path: Path, arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        table(f"--model.pretrained={model_directory}", *arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and said in error and "Traceback" not in error
    assert not (tmp_path / "scored").exists()


def test_models_with_other_tokens_are_not_compared(table, model_directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in model_directory.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["word0"], words["word1"] = words["word1"], words["word0"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SystemExit):
        table("--compare", model_directory, other)
