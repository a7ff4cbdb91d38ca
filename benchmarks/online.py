"""What a Kronecker product ahead of a W4A4 linear costs on one GPU: microseconds at the sizes of LLaMA-7B.

Weights are cold: a time is that of a CUDA graph of calls over copies of the weight that together exceed 200 MB, at
least 10 ms long, the median of five. Of the linear with rounding and Kronecker product in its kernels, of the same with
the product in PyTorch ahead of it, of the linear that only rounds, and of its integer product alone; and of the kernel
that multiplies, cuts and rounds tokens, alone, its input warm. Each answers within its tolerance of the plain path.

    python benchmarks/online.py --seconds 80
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from aq_lightning.kernels.int4_int8_matmul import int4_int8_matmul
from aq_lightning.kernels.int4_int8_matmul import triton as product
from aq_lightning.kernels.int4_matmul.config import Config, Product, choose
from aq_lightning.kernels.kronecker_matmul import Kronecker, kronecker_matmul, naive, triton
from aq_lightning.kernels.packed import Operands
from aq_lightning.kernels.tuning import COLD, calls, microseconds, random_operands

LINEARS = {"q, k, v": (12288, 64, 64), "gate, up": (22016, 64, 64), "down": (4096, 86, 128)}
"""Name → rows, and the sizes of both matrices."""
TOKENS = (1, 16, 128, 2048)
_TOLERANCE = 2e-2  # relative: an activation on an edge of its grid falls on either side

Runs = dict[str, list[Callable[[], object]]]


def ways(x: Tensor, by: Kronecker, weights: list[Operands], bits: int, config: Config) -> Runs:
    """What is timed, by name."""
    width = product.width_of(x.shape[1], weights[0], config)
    alone = Product(x.shape[0], weights[0].scales.shape[1], x.shape[1], 4, bits)
    return {
        "linear with Kronecker": [lambda w=w: kronecker_matmul(x, by, w, bits) for w in weights],
        "… in PyTorch ahead": [lambda w=w: int4_int8_matmul(naive.transformed(x, by), *w, bits) for w in weights],
        "linear": [lambda w=w: int4_int8_matmul(x, *w, bits) for w in weights],
        "product alone": calls(alone, x, weights, config),
        "kernel": [lambda: triton.quantize(x, by, bits, weights[0], width)] * 20,
    }


def measured(name: str, tokens: int, bits: int) -> dict[str, float | int | str]:
    """One line: microseconds of each way."""
    rows, *sides = LINEARS[name]
    columns = sides[0] * sides[1]
    first = random_operands(rows, columns, 4, columns, "cuda")
    copies = [Operands(first.words.clone(), first.scales.clone(), 4) for _ in range(-(-COLD // first.words.nbytes) - 1)]
    weights = [first, *copies]
    left, right = (torch.linalg.qr(torch.randn(n, n, device="cuda"))[0].half() for n in sides)
    by = Kronecker(left, right, torch.tensor([0.9, 0.95], device="cuda").half())
    x = torch.randn(tokens, columns, device="cuda").half()
    config = choose(Product(tokens, rows, columns, 4, 8), x.device)
    expected = naive.transformed(x, by)
    expected = int4_int8_matmul(expected, *first, bits).float()
    error = float((kronecker_matmul(x, by, first, bits).float() - expected).norm() / expected.norm())
    if not error <= _TOLERANCE:
        raise SystemExit(f"{name}, {tokens} tokens: error {error:.1e}")
    times = {way: microseconds(runs) for way, runs in ways(x, by, weights, bits, config).items()}
    return {"linear": name, "tokens": tokens, "bits": bits, "error": error, "config": str(config), "us": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=80, help="after which no further line is begun")
    parser.add_argument("--bits", type=int, default=4, help="of activations")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--out", type=Path, default=Path("online.jsonl"), help="every result, a line each")
    given = parser.parse_args()
    ends = time.monotonic() + given.seconds
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, W4A{given.bits}, microseconds\n")
    head: list[str] = []
    for tokens in given.tokens:
        for name in LINEARS:
            if time.monotonic() > ends:
                raise SystemExit(f"out of time before {name}, {tokens} tokens")
            line = measured(name, tokens, given.bits)
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            times = line["us"]
            if not head:
                head = [*times, "Kronecker, % of the linear"]
                print(f"| linear | tokens | {' | '.join(head)} |\n{'|---' * (len(head) + 2)}|")
            share = 100 * (times["linear with Kronecker"] - times["linear"]) / times["linear"]
            print(f"| {name} | {tokens} | {' | '.join(f'{t:.1f}' for t in times.values())} | {share:.1f} |", flush=True)


if __name__ == "__main__":
    main()
