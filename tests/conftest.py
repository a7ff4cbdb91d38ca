"""Shared fixtures: fixed seeds, a tiny model on disk with its tokenizer, a user's text, and the command line."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run in its interpreter

from helpers import CONFIGS, ROOT, tiny_llama, word_tokenizer

from aq_lightning.cli import main

SLOW = ("test_kill.py", "test_docs.py", "test_distributed.py", "test_streaming.py", "test_block.py", "test_api.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests of many seconds come first, so that at the end no process is left alone with one."""
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def own_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process like a user's: no arguments of pytest's, and a cache of windows that goes with the session."""
    torch.set_num_threads(1)  # the models are tiny: threads only wait for each other
    gc.collect()
    gc.freeze()  # libraries' objects would be looked through thrice a run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        patch.setenv("AQ_LIGHTNING_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(sys, "argv", ["train.py"])
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float16 LLaMA of 2 blocks and its tokenizer, as transformers saves them."""
    directory = tmp_path_factory.mktemp("model")
    tiny_llama().half().save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's text of 1,500 words, a word a token."""
    path = tmp_path_factory.mktemp("text") / "book.txt"
    words = random.Random(0).choices(range(94), weights=[1 / (rank + 1) for rank in range(94)], k=1500)
    path.write_text(" ".join(f"word{word}" for word in words))
    return path


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """What stands for ``python`` before a script that needs no interpreter of its own: see ``nursery.py``."""
    address = str(tmp_path_factory.mktemp("n") / "s")  # such names are short
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = str(ROOT / "tests" / "nursery.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, program, address], env=environment, **pipes) as server:
        assert server.stdout.readline() == b"open\n"
        yield [sys.executable, "-IS", program, address]
        server.stdin.close()


@pytest.fixture(scope="session")
def fit(model_directory: Path, text_file: Path) -> Callable[..., Path]:
    """Runs ``fit`` on the tiny model: scheme, run directory, then further arguments, the last of a name winning."""

    def run(scheme: str, out: Path, *more: str, config: str = "affinequant.yaml") -> Path:
        sizes = ["--data.samples=8", "--data.length=32", "--data.evaluation_length=32", "--trainer.max_epochs=2"]
        sizes += ["--report=false"]  # drawn where it is asked for
        main(
            ["fit", f"--config={CONFIGS / config}", f"--model.pretrained={model_directory}", f"--model.scheme={scheme}"]
            + [
                f"--data.source={text_file}",
                "--trainer.accelerator=cpu",
                "--report=false",
                *sizes,
                f"--out={out}",
                *more,
            ]
        )
        return out

    return run
