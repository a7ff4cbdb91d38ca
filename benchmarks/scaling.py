"""One GPU against several: time of a block, memory, equality of the results, and a death of each process in turn.

    python benchmarks/scaling.py --shapes llama-70b smollm2 --devices 1 2 --blocks 4 --batch 8 --seconds 400 --out DIR

Models of a few blocks in the shapes of well-known ones, with random weights, are written as safetensors and calibrated
by ``train.py fit`` with configs/affinequant.yaml, up to the last block: what follows, the checkpoint, is written by one
process whatever their number. Runs on one device go side by side, one model to a GPU; runs on several have the machine
for themselves. Times are from one block's commit to the next; the first block, which also compiles, is left out. Then a
tiny model is calibrated on the greatest number of devices, each of its processes is killed once, and the bytes are
compared with those of a run that was left alone. ``scaling.json`` and ``scaling.md`` are written after every result.

Of two results, the losses before training show how well the statistics agree, those after it how well the whole does:
where a gradient is nearly 0, Adam's steps follow the sign of its rounding error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from calibration import SHAPES, Shape
from kill import digests, tiny_fit, tiny_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
SHARD = "model-{:05d}-of-{:05d}.safetensors"
NAMES = ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")  # of Lightning's launcher


@dataclass(frozen=True)
class Row:
    """One run."""

    shape: str
    devices: int
    block_seconds: float
    """From one block's commit to the next, the median: everything that a block costs."""
    step_seconds: float
    """Of them, in optimizer steps."""
    gpu_gib: float
    """Greatest peak over the processes."""
    host_gib: float
    """Sum of the processes' greatest resident sets."""
    run_seconds: float
    """From the start of the command to the end of the last block."""


@dataclass(frozen=True)
class Size:
    """How much is calibrated."""

    blocks: int
    samples: int
    length: int
    epochs: int
    batch: int
    group: int
    """Input channels that share a scale."""
    place: str
    """Where streams lie."""


class Command:
    """``train.py`` in a session of its own, with what its processes take of the host's memory.

    Args:
        arguments: of ``train.py``.
        log: where it writes.
        gpus: those that it sees; None: all.
    """

    def __init__(self, arguments: Sequence[str], log: Path, gpus: Sequence[int] | None = None) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in NAMES}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        environment["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "1"
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        if gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        self.log, self.began, self.clock, self.peaks = log, time.monotonic(), time.time(), {}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *arguments], cwd=ROOT, env=environment, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._watch, daemon=True).start()

    def pids(self) -> list[int]:
        """Its processes, the first first."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                line = (place / "cmdline").read_bytes()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z" and b"train.py" in line:
                found.append(int(place.name))
        return sorted(found)

    def finish(self, deadline: float) -> float:
        """Waits; seconds that it took.

        Raises:
            RuntimeError: it failed, or time was up.
        """
        try:
            self.process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError("out of time") from None
        if self.process.returncode:
            raise RuntimeError(f"exit code {self.process.returncode}: {self.log.read_text()[-3000:]}")
        return time.monotonic() - self.began

    def reach(self, file: Path, deadline: float) -> float:
        """Waits for a file, and ends all processes; seconds that it took.

        Raises:
            RuntimeError: the command ended without it, or time was up.
        """
        while not file.is_file():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"no {file.name} of the last block: {self.log.read_text()[-3000:]}")
            time.sleep(0.05)
        seconds = file.stat().st_mtime - self.clock  # not now: others may have been waited for
        self.kill()
        return seconds

    def kill(self) -> None:
        """Ends all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _watch(self) -> None:
        while self.process.poll() is None:
            for pid in self.pids():
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                peak = status.partition("VmHWM:")[2].split()
                self.peaks[pid] = int(peak[0]) * 1024 if peak else self.peaks.get(pid, 0)
            time.sleep(0.5)


def write_model(directory: Path, shape: Shape, blocks: int) -> None:
    """A LLaMA of so many random blocks in float16, one file each, with the tokenizer and text of the tiny model."""
    tiny_model(directory)
    (directory / "model.safetensors").unlink()
    config = LlamaConfig(
        vocab_size=96, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=blocks,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value, max_position_embeddings=4096,
        dtype="float16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(directory)
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in wanted.items():
        number = int(name.split(".")[2]) + 1 if ".layers." in name else 0
        files.setdefault(SHARD.format(number + 1, blocks + 1), {})[name] = tensor.shape
    for file, shapes in files.items():
        tensors = {}
        for name, size in shapes.items():
            drawn = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
            drawn = drawn / size[-1] ** 0.5 if len(size) > 1 else 1 + 0.1 * drawn
            tensors[name] = drawn.half().cpu()
        save_file(tensors, directory / file, {"format": "pt"})
    names = {name: file for file, shapes in files.items() for name in shapes}
    index = {"metadata": {}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    words = (directory / "text.txt").read_text()
    (directory / "text.txt").write_text(" ".join([words] * 40))


def arguments(model: Path, size: Size, devices: int, gpu: bool) -> list[str]:
    """Of ``train.py fit``, but for the run directory."""
    return [
        "fit", f"--config={ROOT / 'configs/affinequant.yaml'}", f"--model.pretrained={model}",
        f"--model.scheme=w4a16g{size.group}", f"--model.batch_size={size.batch}", f"--data.source={model / 'text.txt'}",
        f"--data.samples={size.samples}", f"--data.length={size.length}", "--data.evaluation_samples=1",
        f"--data.cache_dir={model / 'cache'}", f"--trainer.max_epochs={size.epochs}", "--save_every=0",
        f"--model.streams.place={size.place}", f"--trainer.accelerator={'gpu' if gpu else 'cpu'}",
        f"--trainer.devices={devices}",
    ]  # fmt: skip


def metrics_of(run: Path, block: int) -> Path:
    """Where a run keeps what it measured of a block, written with everything else of that block at once."""
    return run / f"blocks/{block:04d}/metrics.json"


def blocks_of(run: Path, count: int) -> list[dict]:
    """Metrics of all blocks of a run."""
    return [json.loads(metrics_of(run, block).read_text()) for block in range(count)]


def measured(shape: str, devices: int, run: Path, count: int, command: Command, deadline: float) -> Row:
    """Waits for a run's last block and reads what it measured."""
    seconds = command.reach(metrics_of(run, count - 1), deadline)
    blocks = blocks_of(run, count)
    commits = [metrics_of(run, block).stat().st_mtime for block in range(count)]
    times = [after - before for before, after in pairwise(commits)] or [blocks[0]["seconds"]]
    steps = statistics.median(block["training_seconds"] for block in blocks[1:] or blocks)
    peak, host = max(block["peak_memory_bytes"] for block in blocks), sum(command.peaks.values())
    return Row(shape, devices, statistics.median(times), steps, peak / 2**30, host / 2**30, seconds)


def difference(one: Path, other: Path, count: int) -> dict[str, float]:
    """How two runs differ, relatively: the losses of block 0 before training, those of every block at last; and the
    share of packed words."""
    blocks = [blocks_of(run, count) for run in (one, other)]
    before = max(abs(blocks[1][0]["candidates"][k] / blocks[0][0]["candidates"][k] - 1) for k in ("start", "nearest"))
    after, words, total = 0.0, 0, 0
    for a, b in zip(*blocks, strict=True):
        after = max(after, abs(b["loss"] / a["loss"] - 1))
        first, second = (load_file(run / f"blocks/{a['block']:04d}/weights.safetensors") for run in (one, other))
        for name in (name for name in first if name.endswith("weight_packed")):
            words, total = words + int((first[name] != second[name]).sum()), total + first[name].numel()
    return {"before": before, "after": after, "words": words / total}


def deaths(place: Path, devices: int, gpu: bool, deadline: float) -> dict[str, object]:
    """Kills each process of a run once, lets it go on, and compares its bytes with those of one left alone."""
    tiny_model(place / "deaths")
    more = ["--model.batch_size", str(devices), "--trainer.devices", str(devices), "--model.compiled", "false"]
    more += ["--data.samples", str(2 * devices + 1), "--trainer.max_epochs", "40", "--save_every", "10"]
    command = tiny_fit(place / "deaths", *more, device="gpu" if gpu else "cpu")
    Command(command(place / "alone"), place / "alone.log").finish(deadline)
    waits: list[float] = []
    for rank in reversed(range(devices)):
        life = Command(command(place / "killed"), place / f"killed-{rank}.log")
        least = 10 * (devices - rank)  # steps: each lives longer than the last
        while not any(int(kept.suffix[1:]) >= least for kept in (place / "killed").glob("inside/*[0-9]")):
            if life.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no checkpoint to kill at: {life.log.read_text()[-2000:]}")
            time.sleep(0.02)
        others = [pid for number, pid in enumerate(life.pids()) if number != rank]
        os.kill(life.pids()[rank], signal.SIGKILL)
        began = time.monotonic()
        while set(others) & set(life.pids()) and time.monotonic() < min(deadline, began + 60):
            time.sleep(0.02)
        waits.append(time.monotonic() - began)
        life.kill() if life.pids() else life.process.wait()
    Command(command(place / "killed"), place / "last.log").finish(deadline)
    same = digests(place / "killed") == digests(place / "alone")
    return {"devices": devices, "same bytes": same, "seconds until the others ended": max(waits)}


def report(
    rows: Sequence[Row], differences: Sequence[dict], killed: dict | None, notes: Sequence[str]
) -> Iterator[str]:
    """Markdown."""
    names = ["shape", "devices", "s a block", "in steps", "speed-up", "GPU GiB", "host GiB", "s in all", "loss before"]
    yield f"| {' | '.join([*names, 'after', 'words'])} |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        one = next((each for each in rows if (each.shape, each.devices) == (row.shape, 1)), None)
        speed = f"{one.block_seconds / row.block_seconds:.2f}" if one is not None else "–"
        key = {"shape": row.shape, "devices": row.devices}
        apart = next((each for each in differences if key.items() <= each.items()), None)
        ends = " | ".join(f"{apart[name]:.1e}" for name in ("before", "after", "words")) if apart else "– | – | –"
        yield (f"| {row.shape} | {row.devices} | {row.block_seconds:.1f} | {row.step_seconds:.1f} | {speed} | "
               f"{row.gpu_gib:.1f} | {row.host_gib:.1f} | {row.run_seconds:.0f} | {ends} |")  # fmt: skip
    if killed is not None:
        yield ""
        yield (f"Each of {killed['devices']} processes killed once: {'the same' if killed['same bytes'] else 'OTHER'} "
               f"bytes; the others ended within {killed['seconds until the others ended']:.1f} s.")  # fmt: skip
    yield from notes


class Bench:
    """Everything, with partial results on the disk.

    Args:
        options: of the command line.
        place: scratch.
    """

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.options, self.place = options, place
        self.deadline = time.monotonic() + options.seconds
        self.gpu = torch.cuda.is_available()
        self.rows: list[Row] = []
        self.differences: list[dict] = []
        self.killed: dict | None = None
        self.notes: list[str] = []

    def run(self) -> None:
        """Models, single runs side by side, runs on several devices, deaths."""
        sizes = {name: self.size(name) for name in self.options.shapes}
        for name, size in sizes.items():
            write_model(self.place / name, SHAPES[name], size.blocks)
        if 1 in self.options.devices:
            self.alone(sizes)
        for devices in (count for count in self.options.devices if count > 1):
            for name, size in sizes.items():
                self.together(name, size, devices)
        if not self.options.skip_deaths and max(self.options.devices) > 1:
            self.attempt("deaths", self._deaths)

    def size(self, name: str) -> Size:
        """Of a shape's model."""
        o, group = self.options, math.gcd(128, SHAPES[name].hidden)
        return Size(o.blocks, o.samples, o.length, o.epochs, o.batch, group, o.place)

    def alone(self, sizes: dict[str, Size]) -> None:
        """One device each, as many at once as there are GPUs."""
        lanes = max(torch.cuda.device_count(), 1)
        names = list(sizes)
        for start in range(0, len(names), lanes):
            started = [
                (name, self.start(name, sizes[name], 1, lane)) for lane, name in enumerate(names[start:][:lanes])
            ]
            for name, command in started:
                self.attempt(f"{name} on 1", lambda n=name, c=command: self.take(n, 1, c))

    def together(self, name: str, size: Size, devices: int) -> None:
        """Several devices, and what they do otherwise than one."""
        self.attempt(f"{name} on {devices}", lambda: self.take(name, devices, self.start(name, size, devices, None)))
        runs = [self.place / f"{name}-{count}" for count in (1, devices)]
        if all(metrics_of(run, size.blocks - 1).is_file() for run in runs):
            self.differences.append({"shape": name, "devices": devices, **difference(*runs, size.blocks)})
            self.write()

    def start(self, name: str, size: Size, devices: int, lane: int | None) -> Command:
        """Begins a run."""
        given = arguments(self.place / name, size, devices, self.gpu)
        run = self.place / f"{name}-{devices}"
        gpus = None if lane is None or not self.gpu else [lane]
        return Command([*given, f"--out={run}"], self.place / f"{name}-{devices}.log", gpus)

    def take(self, name: str, devices: int, command: Command) -> None:
        """Waits for a run's row."""
        run = self.place / f"{name}-{devices}"
        self.rows.append(measured(name, devices, run, self.options.blocks, command, self.deadline))

    def _deaths(self) -> None:
        self.killed = deaths(self.place, max(self.options.devices), self.gpu, self.deadline)

    def attempt(self, what: str, work: object) -> None:
        """Does a part; what fails is noted, and the rest goes on."""
        try:
            work()
        except RuntimeError as error:
            self.notes.append(f"\n{what}: {error}")
        self.write()

    def write(self) -> None:
        """Whatever is known."""
        device = torch.cuda.get_device_name() if self.gpu else "CPU"
        lines = [f"{device}, torch {torch.__version__}, {self.size(self.options.shapes[0])}", ""]
        lines += report(self.rows, self.differences, self.killed, self.notes)
        content = {"device": device, "rows": [asdict(row) for row in self.rows], "differences": self.differences,
                   "deaths": self.killed, "notes": self.notes}  # fmt: skip
        self.options.out.mkdir(parents=True, exist_ok=True)
        (self.options.out / "scaling.md").write_text("\n".join(lines) + "\n")
        (self.options.out / "scaling.json").write_text(json.dumps(content, indent=2))


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-70b", "llama-7b"])
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--place", choices=("device", "host"), default="device", help="of the streams")
    parser.add_argument("--seconds", type=float, default=330)
    parser.add_argument("--skip_deaths", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("scaling"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(options, Path(place))
        bench.run()
    print((options.out / "scaling.md").read_text())


if __name__ == "__main__":
    _main()
