"""Memory does not grow with the number of blocks."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import CONFIGS, ROOT, tiny_llama, word_tokenizer
from torch import Tensor

from aq_lightning import pipeline
from aq_lightning.calibration import LiveWindow

FEW, MANY = 8, 64  # blocks
PEAK = """
import sys
from pathlib import Path
from aq_lightning.cli import main
main(sys.argv[1:])
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""
"""What getrusage says begins with the peak of the process that started this one."""


def peak(directory: Path, text_file: Path, blocks: int) -> int:
    """Peak resident set, in KiB, of a process that calibrates a model of so many blocks of 2 MB, scores and exports."""
    model = tiny_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=blocks).half()
    model.save_pretrained(directory / "model", max_shard_size="15MB")
    word_tokenizer().save_pretrained(directory / "model")
    assert len(list((directory / "model").glob("*.safetensors"))) > blocks / 8
    arguments = [
        "fit", f"--config={CONFIGS / 'affinequant.yaml'}", f"--model.pretrained={directory / 'model'}",
        "--model.scheme=w4a16g64", f"--data.source={text_file}", "--data.samples=4", "--data.length=16",
        "--data.evaluation_length=16", "--data.evaluation_samples=2", "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu", "--report=false", f"--out={directory / 'run'}",
    ]  # fmt: skip
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # as a user has it
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], cwd=ROOT, env=plain, capture_output=True, text=True, check=True
    )
    assert (directory / "run" / "results.json").is_file()
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is told in another way elsewhere")
def test_host_memory_is_flat_in_the_number_of_blocks(tmp_path: Path, text_file: Path) -> None:
    """From 8 blocks to 64 the peak stays within 5 %; read whole, the model alone would add more than 100 MB."""
    few, many = (peak(tmp_path / str(blocks), text_file, blocks) for blocks in (FEW, MANY))
    assert many <= 1.05 * few, f"{FEW} blocks: {few / 1024:.0f} MiB, {MANY} blocks: {many / 1024:.0f} MiB"


def test_nothing_is_left_of_the_streams_of_the_block_before(
    fit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What enters a block in full precision and quantized, at first the same; what it answers; what it is to answer, in
    whose place is what it answers in the end. Counted where it answers the one, teaches by its answer to the other, is
    fitted, and has answered the other."""
    calibrate, run, answers, counts = pipeline.calibrate, LiveWindow.run, LiveWindow.answers, []

    def count(like: Tensor) -> None:
        looks = like.shape, like.dtype
        alike = [each for each in gc.get_objects() if type(each) is Tensor and (each.shape, each.dtype) == looks]
        counts.append(len({each.untyped_storage().data_ptr() for each in alike}))

    def calibrated(job: pipeline.Job, *others: Any) -> Tensor:
        count(others[3].full)
        return calibrate(job, *others)

    def answered(live: LiveWindow, stream: Tensor, *others: Any, **named: Any) -> Tensor:
        count(stream)
        return run(live, stream, *others, **named)

    def judged(live: LiveWindow, stream: Tensor, target: Tensor) -> tuple[float, Tensor]:
        found = answers(live, stream, target)
        count(stream)
        return found

    monkeypatch.setattr(pipeline, "calibrate", calibrated)
    monkeypatch.setattr(LiveWindow, "answers", judged)
    monkeypatch.setattr(LiveWindow, "run", answered)
    fit("w3a16g32", tmp_path / "run", "--data.samples=7")
    assert counts == [1, 2, 3, 3, 2, 3, 4, 4]
