"""Kills a calibration at random instants, lets it go on until it is done, and compares every byte of the result.

python benchmarks/kill.py --kills 100 [--device cuda] [--compiled true] [--captured false] [--seed 0]
    [--keep_streams false]

A nursery process imports everything once and forks a child for every life of a run. A child dies of SIGKILL at an
event (the n-th write, sync, rename or optimizer step, a write being cut in half) or at an instant of the clock.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EVENTS = ("write", "fsync", "replace", "rename", "mkdir")
"""Functions of ``os`` whose calls are counted; optimizer steps are counted too."""
TENSORS = ("checkpoint/*", "blocks/*/weights.safetensors", "blocks/*/transforms.safetensors", "tuning/*.safetensors")
"""Files of a run that must come out the same."""
MEASURED = ("seconds", "training_seconds", "peak_memory_bytes")
"""What differs from run to run."""


@dataclass(frozen=True)
class Life:
    """What became of one process."""

    status: int
    """Exit code, or minus the signal that killed it."""
    events: int
    """Counted until then."""
    seconds: float
    """Wall time."""


class Nursery:
    """A process that has imported everything and forks children that run ``train.py``."""

    def __init__(self, log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
                       "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
        command = [sys.executable, __file__, "--serve", str(log)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def run(self, arguments: list[str], event: int | None = None, seconds: float | None = None) -> Life:
        """One life of ``train.py``, to its end or to the event or instant at which it is killed."""
        self._process.stdin.write(json.dumps({"arguments": arguments, "event": event, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        return Life(**json.loads(self._process.stdout.readline()))


def digests(run: Path) -> dict[str, str]:
    """File → sha256 of everything that must come out the same, and block → its metrics without what is measured."""
    files = [path for pattern in TENSORS for path in run.glob(pattern) if path.is_file()]
    sums = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}
    results = json.loads((run / "results.json").read_text())
    for block in [*results["blocks"], *([results["tuning"]] if results["tuning"] else [])]:
        sums[f"block {block.get('block', 'of all')}"] = str({k: v for k, v in block.items() if k not in MEASURED})
    return {**sums, "table": str(results["rows"])}


def kill_until_done(
    nursery: Nursery, command: Callable[[Path], list[str]], place: Path, kills: int, seed: int
) -> Iterator[Counter[str]]:
    """Counts after every run that came to its end: kills by kind, and runs by whether their bytes are the reference's.

    Args:
        nursery: where processes are born.
        command: arguments of ``train.py`` for a run directory.
        place: directory for the runs.
        kills: to make at least.
        seed: of the instants.
    """
    reference = nursery.run(command(place / "reference"))
    if reference.status != 0:
        raise RuntimeError(f"the uninterrupted run ended with {reference.status}: see its log")
    expected, counts = digests(place / "reference"), Counter({"events of a run": reference.events})
    dice = random.Random(seed)
    for number in itertools.count():
        run = place / f"run-{number}"
        while True:
            by_event = dice.random() < 0.75
            life = nursery.run(
                command(run),
                event=dice.randrange(1, max(2, reference.events // 2)) if by_event else None,
                seconds=None if by_event else dice.uniform(0, reference.seconds / 2),
            )
            if life.status == 0:
                break
            if life.status != -signal.SIGKILL:
                raise RuntimeError(f"a life ended with {life.status}: see its log")
            counts["kills by event" if by_event else "kills by clock"] += 1
        found = digests(run)
        counts["same bytes" if found == expected else "OTHER BYTES"] += 1
        for name in sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name)):
            print(f"{run.name}: {name} differs", flush=True)
        yield counts
        if counts["kills by event"] + counts["kills by clock"] >= kills:
            return


def tiny_model(directory: Path) -> None:
    """A random float16 LLaMA of 2 blocks with a tokenizer, and ``text.txt``."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).half().save_pretrained(directory)
    words = {word: index for index, word in enumerate(["<unk>", *(f"word{number}" for number in range(95))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(directory)
    text = random.Random(0).choices(range(95), weights=[1 / (rank + 1) for rank in range(95)], k=1500)
    (directory / "text.txt").write_text(" ".join(f"word{word}" for word in text))


def tiny_fit(directory: Path, *more: str, device: str = "cpu") -> Callable[[Path], list[str]]:
    """``fit`` of :func:`tiny_model` with a checkpoint after every step."""
    fixed = ["fit", "--config", str(ROOT / "configs/affinequant.yaml"), "--model.pretrained", str(directory)]
    fixed += ["--model.scheme", "w3a16g32", "--model.decay", "cosine", "--model.batch_size", "3"]
    fixed += ["--data.source", str(directory / "text.txt"), "--data.samples", "8", "--data.length", "24"]
    fixed += ["--data.cache_dir", str(directory / "cache"), "--data.evaluation_samples", "2"]
    fixed += ["--trainer.max_epochs", "3", "--trainer.accelerator", device, "--save_every", "1", *more]
    fixed += ["--trainer.deterministic", "true"] if device != "cpu" else []
    return lambda run: [*fixed, "--out", str(run)]


def _serve(log: Path) -> None:
    """The nursery: one JSON line in, one JSON line out, for each life."""
    import aq_lightning.cli  # noqa: F401, I001
    import callbacks  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    gc.collect()
    gc.freeze()  # children collect their own garbage only
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _live(order, log, writing)
        os.close(writing)
        if order["seconds"] is not None:
            time.sleep(order["seconds"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as pipe:
            events = len(pipe.read())
        life = Life(os.waitstatus_to_exitcode(status), events, time.monotonic() - began)
        print(json.dumps(vars(life)), flush=True)
    os._exit(0)  # frozen objects would be reported as leaks


def _live(order: dict, log: Path, pipe: int) -> None:
    """A child: counts its events in a pipe, and dies where it is told to."""
    import torch

    from aq_lightning.calibration import BlockCalibration, WholeModel
    from aq_lightning.cli import main

    torch.set_num_threads(1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdin.close()
    counted, write = [0], os.write

    def event(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def stand_in(*arguments, **options):
            counted[0] += 1
            write(pipe, b".")
            if counted[0] == order["event"]:
                if name == "write":
                    write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            if name != "fsync":  # a killed process takes no disk with it
                return original(*arguments, **options)

        setattr(owner, name, stand_in)

    for name in EVENTS:
        event(os, name)
    event(BlockCalibration, "training_step")
    event(WholeModel, "training_step")
    status = 1
    try:
        main(order["arguments"])
        status = 0
    except SystemExit as exit:
        status = int(exit.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep_streams", choices=("true", "false"), default="true")
    parser.add_argument("--compiled", choices=("true", "false"), default="false")
    parser.add_argument("--captured", choices=("true", "false", "null"), default="null")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        _serve(options.serve)
        return
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        tiny_model(directory / "model")
        more = ["--keep_streams", options.keep_streams]
        more += ["--model.compiled", options.compiled, "--model.captured", options.captured]
        command = tiny_fit(directory / "model", *more, device=options.device)
        counts: Counter[str] = Counter()
        with Nursery(directory / "log") as nursery:
            try:
                for counts in kill_until_done(nursery, command, directory, options.kills, options.seed):
                    print(dict(counts), flush=True)
            except RuntimeError:
                print((directory / "log").read_text()[-4000:])
                raise
    sys.exit(1 if counts["OTHER BYTES"] else 0)


if __name__ == "__main__":
    _main()
