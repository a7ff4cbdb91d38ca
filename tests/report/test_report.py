"""The report says what the run's files say, loads nothing, and can be read on any screen."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aq_lightning.cli import main
from aq_lightning.errors import RequestError
from aq_lightning.report import Record, page, write_report
from aq_lightning.report.figures import band, over_depth, over_epochs
from aq_lightning.report.record import Epoch
from aq_lightning.transforms.affine import gradual_mask

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "br", "path", "use", "image", "rect", "stop"}


class Outline(HTMLParser):
    """Texts by tag, every attribute, and that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


@pytest.fixture(scope="module")
def run(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report."""
    out = tmp_path_factory.mktemp("report") / "first"
    return fit("w3a16g32", out, "--report=true", "--trainer.max_epochs=3")


@pytest.fixture(scope="module")
def outline(run: Path) -> Outline:
    return Outline((run / "report.html").read_text(encoding="utf-8"))


def test_table_and_sections(run: Path, outline: Outline) -> None:
    results = json.loads((run / "results.json").read_text())
    for row in results["rows"]:
        assert f"{row['perplexity']:.2f}" in outline.texts["td"] and f"{row['bits']:.3f}" in outline.texts["td"]
    size = (run / "checkpoint/model.safetensors").stat().st_size
    assert f"{size / 1e6:,.1f} MB" in outline.texts["td"]
    headings = ["Loss", "What went otherwise", "Invertibility", "Learnt matrices", "Ranges"]
    assert outline.texts["h2"] == [*headings, "What folds, and what stays at run time"]
    assert {"value_output", "Diagonal, Affine"} <= set(outline.texts["td"])
    assert outline.texts["h1"][0].endswith(", w3a16g32")


def test_every_figure_is_there_with_its_words(outline: Outline) -> None:
    said = outline.texts["figcaption"]
    assert said[:4] == [
        "Of each block",
        "Of each epoch, faint to strong from the first block to the last",
        "Condition number of each site's transform",
        "Dominance margin of affine matrices: 1 diagonal, 0 no guarantee",
    ]
    assert sum("off-diagonals open" in caption for caption in said) == 2, "of both blocks"
    assert "Activations: mlp_input, greatest magnitude" in said
    assert "Weights: mlp.down_proj.weight, greatest / median channel" in said
    assert {"round to nearest", "before training", "as left", "mlp_hidden"} <= set(outline.texts["text"])


def test_nothing_is_loaded_and_names_are_unique(outline: Outline) -> None:
    for name, value in outline.attributes:
        if name in ("href", "src", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,")), value[:80]
    names = [value for name, value in outline.attributes if name == "id"]
    assert len(names) == len(set(names)) > 50
    used = {value[1:] for name, value in outline.attributes if name.endswith("href") and value.startswith("#")}
    used |= {found for _, value in outline.attributes for found in re.findall(r"url\(#([^)]*)\)", value or "")}
    assert used and used <= set(names), "and every reference finds its own"


def test_colours_come_from_the_page(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    light, _, dark = text.partition("prefers-color-scheme: dark")
    assert {"--ink", "--faint", "--line-0"} <= used
    assert all(f"{name}: #" in light and f"{name}: #" in dark.partition("</style>")[0] for name in used)
    assert not re.search(r"#0[123]0[123]0[0-9]\b", text), "no stand-in is left"


def test_same_run_same_page(run: Path) -> None:
    before = (run / "report.html").read_bytes()
    assert write_report(run).read_bytes() == before


def test_journal_says_what_the_report_draws(run: Path) -> None:
    """Transforms flatten what activations reach, at no site of the tiny model more than at the MLP's input."""
    for block in json.loads((run / "results.json").read_text())["blocks"]:
        before, after = block["reach"]["activations before"], block["reach"]["activations after"]
        assert set(before) == set(after) == {"attention_input", "value_output", "mlp_input", "mlp_hidden"}
        assert after["mlp_input"]["spread"] < 0.9 * before["mlp_input"]["spread"]
        weights = block["reach"]["weights after"]
        assert len(weights) == 7 and weights != block["reach"]["weights before"]


def test_matrices_are_those_of_the_file(run: Path) -> None:
    first, last = Record(run).matrices(2)
    assert (first.block, last.block, first.site) == (0, 1, "value_output")
    stored = load_file(run / "blocks/0001/transforms.safetensors")
    name = "0.transforms.value_output.factors.1."
    assert torch.equal(last.effective, stored[f"{name}matrix"] * stored[f"{name}mask"])


@pytest.mark.parametrize("width", [0, 3, 7])
def test_band(width: int) -> None:
    assert band(gradual_mask(8, width, 0.1, torch.empty(0, dtype=torch.float64))) == width


def test_several_runs_on_one_page(
    run: Path, fit: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = fit("w4a16", tmp_path / "second <b>", config="rtn.yaml")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run), str(other), "--out", str(tmp_path / "both.html")])
    assert ended.value.code == 0 and f"report: {tmp_path / 'both.html'}" in capsys.readouterr().out
    outline = Outline((tmp_path / "both.html").read_text(encoding="utf-8"))
    assert outline.texts["h1"] == ["2 runs"] and len(outline.texts["summary"]) == 2
    assert {"first", "second <b>"} <= set(outline.texts["td"]), "names are text, whatever they hold"
    assert {"first", "second <b>"} <= set(outline.texts["text"])


def test_a_run_at_work_has_a_page(run: Path, tmp_path: Path) -> None:
    partial = tmp_path / "run"
    shutil.copytree(run, partial, ignore=shutil.ignore_patterns("results.json", "checkpoint", "0001", "logs", "*.html"))
    outline = Outline(page([Record(partial)]))
    assert "not finished" in outline.texts["td"]
    assert "Known when the run is finished." in outline.texts["p"]


def test_incidents_are_told(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "blocks/0001/metrics.json"
    metrics = json.loads(file.read_text())
    cause = {"block": 1, "site": "mlp_input", "what": "inverse", "value": None, "epoch": 2}
    condition = {**metrics["condition"], "mlp_hidden": 2e7, "value_output": float("inf")}
    file.write_text(json.dumps({**metrics, "outcome": "first epoch", "causes": [cause], "condition": condition}))
    assert Outline(page([Record(copy)])).texts["li"] == [
        "block 1: training did not help, left as: first epoch",
        "block 1, mlp_input: inverse not finite in epoch 2; tried again",
        "block 1, mlp_hidden: left with condition number 2.0e+07",
        "block 1, value_output: left with condition number inf",
    ]


def test_no_run_no_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 2 and "config.yaml" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_a_run_still_ends(
    fit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    run = fit("w4a16", tmp_path / "run", "--report=true", config="rtn.yaml")
    assert "pip install 'aq-lightning[report]'" in capsys.readouterr().out
    assert not (run / "report.html").exists() and (run / "results.json").exists()
    with pytest.raises(RequestError, match="matplotlib"):
        write_report(run)


def test_nothing_to_draw_draws_nothing() -> None:
    assert over_depth({}, "loss") == over_depth({"a": {}}, "loss") == over_depth({"a": {0: None}}, "loss") == ""
    assert over_epochs([Epoch(0, 0, 1.0), Epoch(1, 0, 1.0)]) == ""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width, dark", [(390, False), (1250, False), (1250, True)])
def test_in_a_browser(run: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """Nothing is wider than the screen, and the picture is as light or dark as asked."""
    frame = tmp_path / "frame.html"
    script = "document.title = [d.documentElement.scrollWidth, getComputedStyle(d.body).backgroundColor].join(`|`)"
    frame.write_text(
        f"<iframe style='width:{width}px;height:900px;border:0' src='{(run / 'report.html').as_uri()}' "
        f"onload='const d = this.contentDocument; {script}'></iframe>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--hide-scrollbars"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000"]
    flags += ["--force-dark-mode"] if dark else []
    command = [str(CHROMIUM), *flags, "--window-size=1400,1000", "--dump-dom", frame.as_uri()]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<title>(\d+)\|rgb\((\d+)", said)
    assert found, said[-500:]
    assert int(found.group(1)) <= width
    assert (int(found.group(2)) < 100) == dark
