"""The documentation is true: every command in it is run here, on a tiny model, unless it says what it needs.

A page's commands run in order in a directory of their own. Models and texts that are not there (hub ids, corpora) are
replaced by the tiny ones, and sizes are made small; all else is what the page says. One command of every verb starts as
a process of its own, the others are forked from one that has imported everything, and draw no report behind ``fit``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import ROOT, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = {
    "gpu": "runs on a GPU, or takes hours without one",
    "network": "installs or downloads",
    "engine": "needs a serving engine",
}
"""What a block that is not run may say, as ``<!-- needs: gpu -->`` on the line above it."""
LANGUAGES = {"bash", "python", "text", "yaml", "json", "css"}
PARTS = ("train.py", "configs", "callbacks", "aq_lightning", "examples")

SHIM = """#!{python} -IS
import os, sys
from os.path import exists

name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
arguments = ["train.py", *arguments] if name == "aq" else arguments
verb = arguments[1] if arguments[:1] == ["train.py"] and len(arguments) > 1 else ""
def absent(option):
    given = [after for before, after in zip(arguments, arguments[1:]) if before == option]
    return not given or not exists(given[-1])
if verb in ("fit", "plan", "test"):
    arguments += ["--data.length=32", "--data.evaluation_length=32", "--trainer.accelerator=cpu"]
    arguments += ["--model.pretrained={model}"] if absent("--model.pretrained") else []
    arguments += ["--data.source={text}"] if absent("--data.source") else []
    if "--data.evaluation" in arguments and absent("--data.evaluation"):
        arguments += ["--data.evaluation={text}"]
if verb in ("fit", "plan"):
    arguments += ["--data.samples=8", "--trainer.max_epochs=2"]
if verb == "doctor":
    arguments = ["train.py", "doctor", "{model}"]
command, first = ["{python}"], os.path.join(os.environ["FIRST"], verb or "none")
if exists(first):
    os.unlink(first)
elif arguments[:1] == ["train.py"]:
    command = {nursery}
    arguments += ["--report=false"] if verb == "fit" else []
os.execv(command[0], [*command, *arguments])
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    line: int
    language: str
    needs: str
    text: str


def blocks(page: Path) -> list[Block]:
    """All of a page, in order."""
    found, opened, needs = [], None, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"\s*```\s*(.*)", line)
        if fence and opened is None:
            opened, content = (number, fence.group(1)), []
        elif fence:
            found.append(Block(opened[0], opened[1], needs, "\n".join(content)))
            opened, needs = None, ""
        elif opened is not None:
            content.append(line)
        elif line.strip():
            marked = re.fullmatch(r"<!-- needs: (\w+) -->", line.strip())
            needs = marked.group(1) if marked else ""
    assert opened is None, f"{page.name}: line {opened[0]} opens a block that nothing closes"
    return found


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_blocks_say_what_they_are(page: Path) -> None:
    """So that no command hides in a block that nothing runs."""
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: a block names its language: {', '.join(sorted(LANGUAGES))}"
        assert not block.needs or block.needs in NEEDS, f"{where}: a block needs {', '.join(NEEDS)}"
        if block.language == "python":
            compile(block.text, where, "exec")
        if block.language == "text":
            assert not re.search(r"^(python|aq|make|pip) ", block.text, re.MULTILINE), f"{where}: bash, not text"
    outside = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.search(r"^ {4,}(python|aq|make|pip) ", outside, re.MULTILINE), "commands stand in fences"


def runnable() -> list[Path]:
    """Pages with commands to run."""
    return [page for page in PAGES if any(each.language == "bash" and not each.needs for each in blocks(page))]


def tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level, as all formats take it, of fewer tokens than the tiny model has."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator([text], trainers.BpeTrainer(vocab_size=90, special_tokens=["<s>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def verbs(page: Path) -> set[str]:
    """Verbs of the commands that a page runs."""
    texts = [block.text for block in blocks(page) if block.language == "bash" and not block.needs]
    return set(re.findall(r"^(?:python train\.py|aq) (\w+)", "\n".join(texts), re.MULTILINE))


def fresh() -> dict[Path, set[str]]:
    """Page → verbs whose first command on it is a process of its own: each verb on the last page that has it."""
    last = {verb: page for page in runnable() for verb in sorted(verbs(page))}
    return {page: {verb for verb, at in last.items() if at == page} for page in runnable()}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory, text_file: Path, nursery: list[str]) -> dict[str, str]:
    """An environment whose ``python`` and ``aq`` take a tiny model for what is not there."""
    place = tmp_path_factory.mktemp("tools")
    tiny_llama(hidden_size=128, intermediate_size=256).half().save_pretrained(place / "model")
    tokenizer(text_file.read_text()).save_pretrained(place / "model")
    (place / "bin").mkdir()
    for name in ("python", "aq"):
        shim = place / "bin" / name
        values = {"python": sys.executable, "nursery": nursery, "model": place / "model", "text": text_file}
        shim.write_text(SHIM.format(**values))
        shim.chmod(0o755)
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "AQ_LIGHTNING_CACHE": str(place / "cache")}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", runnable(), ids=ids)
def test_commands_run(page: Path, tools: dict[str, str], text_file: Path, tmp_path: Path) -> None:
    for part in PARTS:
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / "notes.txt").write_text(text_file.read_text())
    (tmp_path / "first").mkdir()
    for verb in fresh()[page]:
        (tmp_path / "first" / verb).touch()
    for block in blocks(page):
        if block.language == "bash" and not block.needs:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text],
                cwd=tmp_path, env={**tools, "FIRST": str(tmp_path / "first")}, capture_output=True, text=True,
                timeout=600,
            )  # fmt: skip
            where = f"{page.name}:{block.line}"
            assert done.returncode == 0, f"{where}: mend it, or say what it needs ({', '.join(NEEDS)})\n{done.stderr}"
    assert not list((tmp_path / "first").iterdir()), "these verbs began no process of their own"


def test_some_commands_run() -> None:
    """A guard against a mark on everything."""
    pages = {page.name for page in runnable()}
    assert {"README.md", "quickstart.md", "deploy.md", "resume.md", "schemes.md"} <= pages
    started = set().union(*fresh().values())
    assert {"fit", "plan", "test", "predict", "report", "export", "status"} <= started, "a process of its own each"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
