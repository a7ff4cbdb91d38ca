"""Products with packed integer weights on one GPU: microseconds against half-precision cuBLAS and other packages.

Caches are cold and launches cost nothing: a time is that of a CUDA graph of calls over copies of the weight that
together exceed 200 MB, at least 10 ms long, the median of five. Every way first answers within its tolerance of the
float32 product with the dequantized weight, over memory full of NaN; one that does not has no time. Packages that are
not installed are named and left out. Results are kept line by line in --out: nothing is lost when --seconds end.

    python benchmarks/kernels.py --tune --seconds 400     # measures block sizes and keeps the fastest for this GPU
    python benchmarks/kernels.py --seconds 200            # the table of times
    python benchmarks/kernels.py --activation-bits 8 --group 0   # activations rounded per token, a scale for each row
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from peers import INTEGER_PEERS, PEERS, Weights
from torch import Tensor

from aq_lightning.kernels.int4_int8_matmul import int4_int8_matmul
from aq_lightning.kernels.int4_int8_matmul.naive import fake_quantize
from aq_lightning.kernels.int4_matmul import int4_matmul
from aq_lightning.kernels.int4_matmul.config import Config, Product, architecture, choose, own_table
from aq_lightning.kernels.tuning import (
    COLD,
    calls,
    candidates,
    compile_all,
    fastest,
    merge,
    microseconds,
    random_operands,
)

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192))
SHAPES += ((28672, 8192), (8192, 28672), (14336, 4096), (4096, 14336))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
TUNED = (1, 16, 64, 32, 128, 8, 256, 1024, 4096)  # the most wanted first
OURS = "aq_lightning"


def copies(size: int) -> int:
    """Copies of a tensor of ``size`` bytes that exceed the cache."""
    return max(2, -(-COLD // size))


def compiled(config: Config) -> Config:
    """What stands for all configurations of one kernel."""
    return replace(config, splits=min(config.splits, 2))


def tune(given: argparse.Namespace, began: float) -> None:
    """Measures block sizes for every product, and writes the fastest of each as soon as it is known."""
    kind = given.bits, 16 if given.activation_bits == 16 else 8
    products = [Product(t, *shape, *kind) for t in TUNED if t in given.tokens for shape in given.shapes]
    wanted = {compiled(config) for product in products for config in candidates(product)}
    early = {replace(min(wanted, key=str), overlap=True)} if given.overlap else set()
    outcomes = compile_all(sorted(wanted | early, key=str), products[0], given.group or None, given.seconds / 3)
    good = {config for config, why in outcomes.items() if not why}
    for why, number in Counter(why[:300] for why in outcomes.values() if why).most_common(4):
        print(f"{number} kernels: {why}")
    print(
        f"{len(good)} of {len(outcomes)} kernels compiled and right after {time.monotonic() - began:.0f} s", flush=True
    )
    path = given.table or own_table(architecture(torch.device("cuda", 0)))
    operands = {shape: [] for shape in given.shapes}
    for number, product in enumerate(products):
        left = given.seconds - (time.monotonic() - began)
        if left < 2:
            print(f"out of time: {len(products) - number} products not measured")
            return
        shape = (product.rows, product.columns)
        if not operands[shape]:
            first = random_operands(*shape, given.bits, given.group or shape[1], "cuda")
            operands[shape] = [first] + [
                first._replace(words=first.words.clone(), scales=first.scales.clone())
                for _ in range(copies(first.words.nbytes) - 1)
            ]
        configs = [config for config in candidates(product) if compiled(config) in good]
        found = fastest(product, operands[shape], configs, left / (len(products) - number), bool(early & good))
        if found:
            merge(path, product, found[0])
            record(given, {"tuned": vars(product), "config": vars(found[0]), "us": found[1], "tried": len(configs)})
            print(f"M={product.tokens} {shape}: {found[1]:.2f} us, {found[0]}", flush=True)


def record(given: argparse.Namespace, line: dict[str, object]) -> None:
    """Keeps a result."""
    with given.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def copy_bandwidth() -> float:
    """Bytes read and written per microsecond by a copy of 2 GB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds([lambda: target.copy_(source)])


def ways(
    weights: Weights, activation_bits: int
) -> Iterator[tuple[str, Callable[[Tensor], list[Callable[[], Tensor]]], float]]:
    """(name, x ↦ calls over copies of the weight, tolerance)."""
    packed = weights.packed()

    def ours(x: Tensor) -> list[Callable[[], Tensor]]:
        if activation_bits == 16:
            return [lambda w=w: int4_matmul(x, *w) for w in packed]
        return [lambda w=w: int4_int8_matmul(x, *w, activation_bits) for w in packed]

    def alone(x: Tensor) -> list[Callable[[], Tensor]]:
        product = Product(x.shape[0], *weights.reference.shape, packed[0].bits, 8)
        config = choose(product, x.device)
        return calls(replace(product, activation_bits=activation_bits), x, packed, config)

    yield OURS, ours, 2e-3, activation_bits < 16
    if activation_bits < 16:
        yield "… without rounding activations", alone, 2e-3, True
    for name, peer in (PEERS if activation_bits == 16 else INTEGER_PEERS).items():
        try:
            calls_of, tolerance = peer(weights)
        except (ImportError, NotImplementedError, RuntimeError, TypeError) as error:
            print(f"{name}: left out ({type(error).__name__}: {str(error).splitlines()[0][:100]})", flush=True)
            continue
        yield name, calls_of, tolerance, False


def one_shape(given: argparse.Namespace, shape: tuple[int, int], ends: float) -> dict[str, dict[int, float]]:
    """Way → tokens → microseconds."""
    weights = Weights(*shape, given.bits, given.group or shape[1], given.symmetric, copies)
    times: dict[str, dict[int, float]] = {}
    for name, calls_of, tolerance, rounds in ways(weights, given.activation_bits):
        times[name] = {}
        for tokens in given.tokens:
            if time.monotonic() > ends or (name == "tinygemm" and tokens > 128):
                continue
            x = torch.randn(tokens, shape[1], device="cuda").half()
            seen = fake_quantize(x.float(), given.activation_bits) if rounds else x.float()
            expected = seen @ weights.reference.T
            try:
                runs = calls_of(x)
                torch.full_like(expected, float("nan"), dtype=x.dtype)  # freed at once: the answer takes its place
                error = float((runs[0]().float() - expected).norm() / expected.norm())
                if not error <= tolerance:
                    print(f"{name} {shape} M={tokens}: error {error:.1e}", flush=True)
                    continue
                times[name][tokens] = microseconds(runs)
            except RuntimeError as reason:
                print(f"{name} {shape} M={tokens}: {str(reason).splitlines()[0][:100]}", flush=True)
                continue
            line = {"way": name, "shape": shape, "M": tokens, "us": times[name][tokens], "error": error}
            record(given, line)
    return times


def rows_of(shape: tuple[int, int], bits: float, times: dict[str, dict[int, float]], copy: float) -> Iterator[str]:
    """One shape's Markdown table."""
    tokens = sorted(times[OURS])
    yield f"\n**N={shape[0]}, K={shape[1]}**\n\n| µs | " + " | ".join(map(str, tokens)) + " |"
    yield "|---" * (len(tokens) + 1) + "|"
    for name, found in times.items():
        yield f"| {name} | " + " | ".join(f"{found[t]:.1f}" if t in found else "–" for t in tokens) + " |"
    size = shape[0] * shape[1] * bits / 8

    def share(t: int) -> str:
        return f"{100 * (size + 2 * t * sum(shape)) / times[OURS][t] / copy:.0f}"

    yield "| % of copy | " + " | ".join(map(share, tokens)) + " |"


def means(tables: dict[tuple[int, int], dict[str, dict[int, float]]]) -> Iterator[str]:
    """Geometric means over shapes of the ratio to cuBLAS, and of ours to the best peer of each shape."""
    tokens = sorted({t for times in tables.values() for t in times[OURS]})
    yield "\n| × fp16 | " + " | ".join(map(str, tokens)) + " |\n" + "|---" * (len(tokens) + 1) + "|"

    def line(name: str, ratio: Callable[[dict[str, dict[int, float]], int], float | None]) -> str:
        cells = []
        for t in tokens:
            found = [r for times in tables.values() if (r := ratio(times, t))]
            cells.append(f"{statistics.geometric_mean(found):.2f} ({len(found)})" if found else "–")
        return f"| {name} | " + " | ".join(cells) + " |"

    for name in dict.fromkeys(name for times in tables.values() for name in times):
        yield line(name, lambda times, t, n=name: t in times.get(n, ()) and times["fp16"].get(t, 0) / times[n][t])

    def to_best(times: dict[str, dict[int, float]], t: int) -> float | None:
        others = (found for name, found in times.items() if name not in (OURS, "fp16") and not name.startswith("…"))
        peers = [found[t] for found in others if t in found]
        return min(peers) / times[OURS][t] if peers and t in times[OURS] else None

    yield line("ours to the best peer", to_best)


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="measure block sizes instead of ways")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--activation-bits", type=int, default=16, help="16, or 2 to 8: rounded per token")
    parser.add_argument("--group", type=int, default=128, help="0: a scale for each row")
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, type=lambda text: tuple(map(int, text.split("x"))))
    parser.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=True, help="try starting early")
    parser.add_argument("--table", type=Path, help="where --tune writes; default: this machine's own")
    parser.add_argument("--out", type=Path, default=Path("kernels.jsonl"), help="every result, a line each")
    given = parser.parse_args()
    if given.tune:
        tune(given, began)
        return
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {copy / 1e3:.0f} GB/s")
    tables = {}
    for number, shape in enumerate(given.shapes):
        left = began + given.seconds - time.monotonic()
        if left < 3:
            print(f"out of time: {len(given.shapes) - number} shapes not measured")
            break
        tables[shape] = one_shape(given, shape, time.monotonic() + left / (len(given.shapes) - number))
        torch.cuda.empty_cache()
        print("\n".join(rows_of(shape, given.bits + 32 / (given.group or shape[1]), tables[shape], copy)), flush=True)
    print("\n".join(means(tables)))


if __name__ == "__main__":
    main()
