"""The paper's ablation of the gradual mask and its stability factor, with what happens on the way.

Every cell calibrates the model once with configs/affinequant.yaml and these changes:

- ``no mask``: every entry open from the first epoch on, no projection;
- ``paper mask``: the published schedule, in its floating point, no projection, no fresh optimizer state;
- ``ours``: the configuration as it is: dominance kept by projection, bands opened with a fresh state;
- ``diagonal``: the matrices stay diagonal.

Nothing lets a run fail: an attempt at a block that is stopped is counted and tried again with more caution, so a cell
shows both the perplexity that remains and how often it had to be saved.

    python benchmarks/ablation.py MODEL --out runs/ablation --processes 8 --minutes 8 \
        --samples 32 --length 512 --epochs 8 --data.source wikitext2

Arguments that it does not know go to `train.py fit`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import multiprocessing
import os
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
SCHEMES = ("w3a16g64", "w2a16g64")
STABILITIES = (1.0, 1e-1, 1e-2, 1e-3)
MASKS = ("no mask", "paper mask", "ours")
MATRIX = "aq_lightning.transforms.Affine"
SCHEDULE = "callbacks.GradualMask"


@dataclass(frozen=True)
class Cell:
    """One run of the ablation."""

    scheme: str
    mask: str
    stability: float | None
    """None: diagonal."""

    @property
    def name(self) -> str:
        """For a file."""
        return "-".join(
            [self.scheme, self.mask.replace(" ", "-"), *([f"{self.stability:g}"] if self.stability else [])]
        )


def cells(schemes: list[str], stabilities: list[float]) -> list[Cell]:
    """All runs, those that the rest is compared with first."""
    diagonal = [Cell(scheme, "diagonal", None) for scheme in schemes]
    return diagonal + [Cell(*each) for each in itertools.product(schemes, MASKS, stabilities)]


def configuration(cell: Cell) -> dict[str, object]:
    """configs/affinequant.yaml with the cell's changes."""
    config = yaml.safe_load((ROOT / "configs" / "affinequant.yaml").read_text())
    config["model"] |= {"scheme": cell.scheme, "diagonal_guard": False}
    callbacks = {each["class_path"]: each for each in config["trainer"]["callbacks"]}
    if cell.mask == "diagonal":
        del callbacks[SCHEDULE]
    elif cell.mask != "ours":
        schedule = "none" if cell.mask == "no mask" else "paper"
        callbacks[SCHEDULE]["init_args"] = {"schedule": schedule, "fresh_state": False}
    config["trainer"]["callbacks"] = list(callbacks.values())
    for factor in itertools.chain.from_iterable(config["model"]["transforms"].values()):
        if factor["class_path"] == MATRIX and cell.stability is not None:
            factor["init_args"] = {"stability": cell.stability}
            if cell.mask != "ours":
                factor["init_args"]["dominance"] = None
    return config


def calibrate(task: tuple[Cell, Path, list[str]]) -> tuple[Cell, dict[str, object] | None]:
    """Runs one cell in this process; its output, and its end if it fails, go to ``NAME.log``."""
    from aq_lightning.cli import main  # not in the parent, which only waits

    cell, out, overrides = task
    began, config, run = time.monotonic(), out / f"{cell.name}.yaml", out / cell.name
    config.write_text(yaml.safe_dump(configuration(cell)))
    with (out / f"{cell.name}.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            main(["fit", f"--config={config}", f"--out={run}", *overrides])
            return cell, {**asdict(cell), **findings(run), "minutes": (time.monotonic() - began) / 60}
        except (Exception, SystemExit):
            traceback.print_exc()
            return cell, None


def findings(run: Path) -> dict[str, object]:
    """What a finished run shows."""
    results = json.loads((run / "results.json").read_text())
    blocks = results["blocks"]
    causes = [cause for block in blocks for cause in block["causes"]]
    with next(run.glob("logs/version_*/metrics.csv")).open() as file:
        logged = list(csv.DictReader(file))
    return {
        "perplexity": results["rows"][-1]["perplexity"],
        "full_precision": results["rows"][0]["perplexity"],
        "nearest": results["rows"][1]["perplexity"],
        "loss": math.fsum(block["loss"] for block in blocks),
        "condition": max(known(row["condition/value_output"], math.inf) for row in logged),
        "margin": min(known(row["margin/value_output"], -math.inf) for row in logged),
        "not_finite": sum(cause["value"] is None for cause in causes),
        "stopped": len(causes),
        "blocks_stopped": sum(bool(block["causes"]) for block in blocks),
        "outcomes": dict(Counter(block["outcome"] for block in blocks)),
        "causes": causes,
    }


def known(text: str, otherwise: float) -> float:
    """A logged number, ``otherwise`` in place of one that is not finite."""
    return float(text) if math.isfinite(float(text)) else otherwise


def table(found: list[dict[str, object]], every: list[Cell]) -> str:
    """Markdown; cells that are missing are named below."""
    lines = [
        "| scheme | mask | stability | perplexity | condition | margin | not finite | stopped | not kept | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_cell = {(row["scheme"], row["mask"], row["stability"]): row for row in found}
    for scheme in dict.fromkeys(cell.scheme for cell in every):
        scored = [row for row in found if row["scheme"] == scheme]
        for name, key in (("full precision", "full_precision"), ("round to nearest", "nearest")) if scored else ():
            lines.append(f"| {scheme} | {name} | | {figure(scored[0][key])} | | | | | | |")
        for cell in (cell for cell in every if cell.scheme == scheme):
            row = by_cell.get((cell.scheme, cell.mask, cell.stability))
            if row is not None:
                left = sum(count for outcome, count in row["outcomes"].items() if outcome != "trained")
                entries = (
                    scheme,
                    cell.mask,
                    "" if cell.stability is None else f"{cell.stability:g}",
                    figure(row["perplexity"]),
                    f"{row['condition']:.1e}",
                    f"{row['margin']:.2f}",
                    row["not_finite"],
                    f"{row['stopped']} in {row['blocks_stopped']}",
                    left,
                    f"{row['minutes']:.1f}",
                )
                lines.append(f"| {' | '.join(map(str, entries))} |")
    missing = [cell.name for cell in every if (cell.scheme, cell.mask, cell.stability) not in by_cell]
    return "\n".join(lines + ([f"\nnot run: {', '.join(missing)}"] if missing else []))


def figure(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.2e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory, hub id or `embedded`")
    parser.add_argument("--out", type=Path, required=True, help="directory for runs, logs and ablation.json")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, on the same device")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which the table is printed as it is")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--evaluation-samples", type=int, default=64)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--stabilities", nargs="+", type=float, default=list(STABILITIES))
    parser.add_argument("--compiled", action="store_true", help="compile training steps, once per process and scheme")
    given, further = parser.parse_known_args()
    overrides = [
        f"--model.pretrained={given.model}",
        f"--model.batch_size={given.batch_size}",
        f"--model.compiled={str(given.compiled).lower()}",
        f"--data.samples={given.samples}",
        f"--data.length={given.length}",
        f"--data.evaluation_length={given.length}",
        f"--data.evaluation_samples={given.evaluation_samples}",
        f"--trainer.max_epochs={given.epochs}",
        *further,
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // given.processes)))
    began, every = time.monotonic(), cells(given.schemes, given.stabilities)
    report = given.out / "ablation.json"
    found = json.loads(report.read_text()) if report.exists() else []
    done = {(row["scheme"], row["mask"], row["stability"]) for row in found}
    left = [cell for cell in every if (cell.scheme, cell.mask, cell.stability) not in done]
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:  # leaving it ends what still runs
        answers = pool.imap_unordered(calibrate, [(cell, given.out, overrides) for cell in left])
        try:
            for _ in left:
                seconds = 60 * given.minutes - (time.monotonic() - began)
                cell, row = answers.next(None if math.isinf(seconds) else max(0.0, seconds))
                if row is None:
                    print(f"{cell.name} failed: see {given.out / cell.name}.log", flush=True)
                    continue
                found.append(row)
                report.write_text(json.dumps(found, indent=2))
                print(f"{cell.name}: {figure(row['perplexity'])}", flush=True)
            pool.close()
            pool.join()
        except multiprocessing.TimeoutError:
            print(f"stopped after {given.minutes:g} minutes; the same command goes on with what is left", flush=True)
    print(table(found, every))


if __name__ == "__main__":
    main()
