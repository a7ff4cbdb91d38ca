"""``aq_lightning.quantize`` is the command line's ``fit``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import aq_lightning
from aq_lightning.errors import RequestError
from aq_lightning.methods import CONFIGS, method_file, with_files

OPTIONS = {
    "data.samples": 8,
    "data.length": 32,
    "data.evaluation_length": 32,
    "trainer.max_epochs": 2,
    "trainer.accelerator": "cpu",
    "report": False,
}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint/model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run(model_directory: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> aq_lightning.Quantized:
    out = tmp_path_factory.mktemp("api") / "run"
    return aq_lightning.quantize(model_directory, "w4a16g32", text_file, out, options=OPTIONS)


def test_same_bytes_as_the_command_line(run: aq_lightning.Quantized, fit: Callable[..., Path], tmp_path: Path) -> None:
    other = fit("w4a16g32", tmp_path / "run")
    assert same(tensors(run.run), tensors(other))
    rows = json.loads((other / "results.json").read_text())["rows"]
    assert [row.as_dict() for row in run.rows] == rows
    assert (run.perplexity, run.bits) == (rows[-1]["perplexity"], rows[-1]["bits"])
    assert run.checkpoint == run.run / "checkpoint"
    assert not same(tensors(fit("w4a16g32", tmp_path / "rtn", config="rtn.yaml")), tensors(run.run)), "a control"


def test_a_finished_run_is_answered_at_once(
    run: aq_lightning.Quantized, model_directory: Path, text_file: Path, capsys: pytest.CaptureFixture
) -> None:
    again = aq_lightning.quantize(str(model_directory), "w4a16g32", str(text_file), run.run, options=OPTIONS)
    assert again == run and "is finished" in capsys.readouterr().out


def test_a_model_in_memory_and_texts(
    run: aq_lightning.Quantized, model_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    """The same numbers as from its files, and nothing left beside the run."""
    made = aq_lightning.quantize(
        AutoModelForCausalLM.from_pretrained(model_directory),
        "w4a16g32",
        [text_file.read_text()],
        tmp_path / "run",
        tokenizer=AutoTokenizer.from_pretrained(model_directory),
        options=OPTIONS,
    )
    assert same(tensors(made.run), tensors(run.run))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_other_methods_by_name(model_directory: Path, text_file: Path, tmp_path: Path) -> None:
    made = aq_lightning.quantize(model_directory, "w4a16", text_file, tmp_path / "run", "rtn", options=OPTIONS)
    assert made.rows[-1].model == "rtn" and made.perplexity == pytest.approx(made.rows[1].perplexity, rel=1e-6)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"method": "affinquant"}, "affinequant, "),
        ({"scheme": "w4"}, "w4"),
        ({"options": {"trainer.max_epoch": 3}}, "max_epoch"),
        ({"data": []}, "Texts are strings"),
        ({"data": [b"bytes"]}, "Texts are strings"),
        ({"model": "nowhere/at-all/"}, "nowhere"),
    ],
)
def test_refusals_are_exceptions(
    model_directory: Path, text_file: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    request = {"model": model_directory, "scheme": "w4a16", "data": text_file, "options": OPTIONS, **changes}
    with pytest.raises(RequestError, match=said):
        aq_lightning.quantize(**request, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_in_memory_needs_its_tokenizer(model_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="tokenizer="):
        aq_lightning.quantize(AutoModelForCausalLM.from_pretrained(model_directory), out=tmp_path / "run")


def test_methods_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rtn = CONFIGS / "rtn.yaml"
    assert method_file("rtn") == method_file("configs/rtn.yaml") == method_file(rtn) == rtn
    (tmp_path / "rtn").write_text("model: {}")
    assert method_file("rtn") == Path("rtn"), "a file of that name wins"
    (tmp_path / "rtn").unlink()
    assert with_files(["fit", "--config", "rtn", "--config=rtn", "--out", "rtn"]) == [
        "fit", "--config", str(rtn), f"--config={rtn}", "--out", "rtn"
    ]  # fmt: skip


def test_importing_the_package_does_not_import_torch() -> None:
    program = "import sys, aq_lightning; aq_lightning.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0
    with pytest.raises(AttributeError, match="quantise"):
        _ = aq_lightning.quantise


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples(nursery: list[str], example: Path, model_directory: Path, text_file: Path, tmp_path: Path) -> None:
    fields = [f"{name}={value}" for name, value in OPTIONS.items()]
    python = [sys.executable] if example.stem == "quantize" else nursery  # one in a process of its own
    command = [*python, str(example), str(model_directory), str(text_file), str(tmp_path / "out"), *fields]
    environment = {"PYTHONPATH": str(ROOT), "AQ_LIGHTNING_CACHE": str(tmp_path / "cache"), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 3 and list((tmp_path / "out").rglob("results.json"))
