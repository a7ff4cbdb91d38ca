"""The accuracy table: our configurations and the peers' own packages on the same model, windows and texts.

Each row is a process of its own: it quantizes the model, exports a checkpoint, and scores what transformers loads of
it. Rows are written to OUT as they come; the same command goes on with those that are left, and a calibration of ours
inside a block. A peer takes part where its package can be imported; since peers want versions of their own, what it
needs may lie in a directory apart:

    python -m pip install --no-deps --target PEERS/auto-round auto-round==0.15.1 py-cpuinfo
    python -m pip install --no-deps --target PEERS/llmcompressor llmcompressor==0.14.0.1 compressed-tensors==0.19.0 \
        auto-round==0.15.1 loguru nvidia-ml-py py-cpuinfo

    python benchmarks/accuracy.py MODEL --out runs/accuracy --processes 6 --minutes 15 --seconds 570 \
        --calibration wikitext2=wiki.train.head.txt c4=c4.calibration.txt \
        --evaluation wikitext2=wiki.test.raw c4=c4.evaluation.txt \
        --methods rtn gptq affinequant-rounding auto-round llm-compressor --schemes w3a16g64 --seeds 42 43 44 \
        --packages auto-round=PEERS/auto-round llm-compressor=PEERS/llmcompressor

MODEL is a directory that transformers loads. Texts to be scored on are named as --perplexity of `test` names them.
Peers are asked for schemes of weights alone. A method is the name of a file in configs/, a path of one, or a peer.
Minutes are those of quantizing and exporting, while as many rows as named share the device. Arguments that it does not
know go to `train.py fit`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package is not installed

from benchmarks.rows import ROOT, Limits, Row, result, work, write

PEERS = {"auto-round": "auto_round", "llm-compressor": "llmcompressor"}
"""Method → the module that must be there."""
FULL = "full precision"
UNCALIBRATED = ("rtn",)
"""Methods that no text and no seed changes."""
NONE = "–"


def names(given: Sequence[str], kind: str) -> dict[str, str]:
    """``NAME=VALUE`` each."""
    for each in given:
        if "=" not in each:
            raise SystemExit(f"error: --{kind} takes NAME=PATH, got {each!r}.")
    return dict(each.split("=", 1) for each in given)


def rows(given: argparse.Namespace, further: Sequence[str]) -> list[Row]:
    """Full precision, then every method × scheme × text × seed: all schemes of a seed before the next seed."""
    texts, packages = names(given.calibration, "calibration"), names(given.packages, "packages")
    common = {
        "model": str(given.model.resolve()),
        "texts": names(given.evaluation, "evaluation"),
        "samples": given.samples,
        "length": given.length,
        "evaluation_length": given.evaluation_length,
        "most": given.evaluation_samples,
        "iterations": given.iterations,
        "device": given.device,
        "further": list(further),
    }
    first = (next(iter(texts)), given.seeds[0])
    cells = [(FULL, NONE, *first)]
    for seed, text, scheme, method in itertools.product(given.seeds, texts, given.schemes, given.methods):
        once, alone = method in UNCALIBRATED, method in PEERS and "a16" not in scheme
        if not alone and (not once or (text, seed) == first):
            cells.append((method, scheme, text, seed))
    made = []
    for method, scheme, text, seed in cells:
        plain = method in (FULL, *UNCALIBRATED)
        stem = Path(method).stem if method not in PEERS else method
        parts = [stem, scheme] if plain else [stem, scheme, text, f"seed{seed}"]
        cell = {"method": stem, "scheme": scheme, "calibration": NONE if plain else text, "seed": seed}
        task = {**common, **cell, "config": str(configuration(method)), "text": texts[text]}
        path = [Path(packages[method])] if method in packages else []
        script = Path(__file__).with_name("accuracy_row.py")
        made.append(Row("-".join(part for part in parts if part != NONE).replace(" ", "-"), task, script, path))
    return made


def configuration(method: str) -> Path:
    """Of a method that is ours."""
    return Path(method).resolve() if method.endswith(".yaml") else ROOT / "configs" / f"{method}.yaml"


def missing(row: Row) -> str:
    """Why a row cannot be computed here; nothing if it can."""
    method = row.task["method"]
    if method not in PEERS:
        there = method == FULL or Path(row.task["config"]).is_file()
        return "" if there else f"no configuration {row.task['config']}"
    path = os.pathsep.join([*(str(each.resolve()) for each in row.path), os.environ.get("PYTHONPATH", "")])
    tried = subprocess.run(
        [sys.executable, "-c", f"import {PEERS[method]}"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    return "" if tried.returncode == 0 else f"not importable: {tried.stderr.strip().splitlines()[-1]}"


def table(found: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> str:
    """Markdown: one line for the seeds of a method, scheme and calibration text, with their standard deviation."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["scheme"], row["method"], row["calibration"]), []).append(row)
    heads = ["scheme", "method", "calibrated on", *texts, "bits per weight", "minutes", "seeds"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for (scheme, method, calibration), members in groups.items():
        version = f" {members[0]['version']}" if "version" in members[0] else ""
        online = f", +{members[0]['overhead']:.0f} % multiply–adds" if members[0].get("overhead") else ""
        entries = [scheme, f"{method}{version}{online}", calibration]
        entries += [spread([each["perplexity"][text] for each in members]) for text in texts]
        entries += [f"{statistics.mean(each['bits'] for each in members):.2f}"]
        entries += [f"{statistics.mean(each['minutes'] for each in members):.1f}", str(len(members))]
        lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation where there are several."""
    mean = statistics.mean(values)
    digits = "{:.2f}" if mean < 1e4 else "{:.2e}"
    return digits.format(mean) + (f" ± {digits.format(statistics.stdev(values))}" if len(values) > 1 else "")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory that transformers loads")
    parser.add_argument("--out", type=Path, required=True, help="directory for rows, checkpoints, logs and the table")
    parser.add_argument("--calibration", nargs="+", required=True, metavar="NAME=SOURCE", help="as --data.source")
    parser.add_argument(
        "--evaluation", nargs="+", required=True, metavar="NAME=SOURCE", help="as --perplexity of `test`"
    )
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "affinequant", "affinequant-rounding", *PEERS])
    parser.add_argument("--schemes", nargs="+", default=["w4a16", "w3a16g64", "w3a16", "w2a16g64"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--packages", nargs="+", default=[], metavar="PEER=DIRECTORY")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--evaluation-length", type=int, default=2048)
    parser.add_argument("--evaluation-samples", type=int, help="windows of each text; all unless told")
    parser.add_argument("--iterations", type=int, default=200, help="AutoRound's")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--processes", type=int, default=1, help="rows at once, on the same device")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which a row is given up")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which the table is printed as it is")
    return parser


def main() -> None:
    given, further = arguments().parse_known_args()
    share = str(max(1, (os.cpu_count() or 1) // given.processes))
    os.environ |= {name: os.environ.get(name, share) for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")}
    os.environ.setdefault("AQ_LIGHTNING_CACHE", str(given.out.resolve() / "cache"))
    every, texts, possible = rows(given, further), list(names(given.evaluation, "evaluation")), {}
    for row in every:
        possible.setdefault(row.task["method"], missing(row))
    for method, why in possible.items():
        if why:
            print(f"{method} is left out, {why}", flush=True)
    wanted = [row for row in every if not possible[row.task["method"]]]
    for row, ended in work(wanted, given.out, Limits(given.processes, given.minutes, given.seconds)):
        shown = ended if isinstance(ended, str) else {k: round(v, 2) for k, v in ended["perplexity"].items()}
        print(f"{row.name}: {shown}", flush=True)
    cell = ("method", "scheme", "calibration", "seed")
    found = [{**{key: row.task[key] for key in cell}, **ended} for row in wanted if (ended := result(row, given.out))]
    write(given.out / "accuracy.json", {"rows": found})
    if found:
        (given.out / "accuracy.md").write_text(f"{table(found, texts)}\n")
        print(table(found, texts))
    left = [row.name for row in wanted if result(row, given.out) is None]
    print(f"not run: {', '.join(left)}" if left else "all rows are there", flush=True)


if __name__ == "__main__":
    main()
