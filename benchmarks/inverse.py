"""Inverting affine matrices: every method against torch.linalg.inv in the same run, forward and backward, in float64.

Matrices are strictly diagonally dominant (ratio 0.9); Newton's iteration starts from the inverse of a matrix one
optimizer step away, at a residual of about 0.1. A method whose residual or gradient is out of tolerance has no time;
``mixed`` has tolerances of its own, and TensorFloat32 for its float32 products, as in training.

    python benchmarks/inverse.py --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from aq_lightning.calibration.captured import Graph
from aq_lightning.transforms.inverse import _LEAF, TOLERANCE, inverse, tolerance

GRADIENT_TOLERANCE = {"mixed": 1e-2}  # others have that of their residuals
SIZES = ((3, 64), (8, 128), (32, 128), (1, 576), (1, 4096))


def matrices(blocks: int, size: int, device: str) -> Tensor:
    """Random dominant matrices, (blocks, size, size)."""
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(blocks, size, size, dtype=torch.float64, generator=generator)
    matrix.diagonal(dim1=-2, dim2=-1).zero_()
    matrix *= 0.9 / matrix.abs().sum(-1, keepdim=True)
    matrix.diagonal(dim1=-2, dim2=-1).fill_(1)
    return matrix.to(device)


def ways(start: Tensor, wait: bool, leaves: list[int]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Method → matrix ↦ inverse."""

    def halved(matrix: Tensor, leaf: int) -> Tensor:
        with patch("aq_lightning.transforms.inverse._LEAF", leaf):
            return inverse(matrix, "lu", start, wait)[0]

    lu = {f"lu, leaves of {leaf}": partial(halved, leaf=leaf) for leaf in leaves}
    methods = ("newton", "mixed", "pivoted")
    others = {method: lambda m, method=method: inverse(m, method, start, wait)[0] for method in methods}
    return {"torch.linalg.inv": torch.linalg.inv, **lu, **others}


def recorded(run: Callable[[], object]) -> Callable[[], None] | None:
    """The same work replayed from a CUDA graph; None if it cannot be recorded."""
    try:
        return Graph(run, warm_up=3).replay
    except RuntimeError:
        return None


def milliseconds(run: Callable[[], object], device: str, repetitions: int) -> float:
    """Median over single runs, each until the device is done."""
    times = []
    for repetition in range(repetitions + 3):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if repetition >= 3:
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def figures(
    method: str, invert: Callable[[Tensor], Tensor], matrix: Tensor, weight: Tensor, repetitions: int
) -> list[str]:
    """Residual, error of the gradient, and if both are in tolerance three times."""
    identity = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)

    def both(invert: Callable[[Tensor], Tensor] = invert) -> Tensor:
        return torch.autograd.grad((invert(matrix) * weight).sum(), matrix)[0]

    with torch.no_grad():
        residual = float((identity - matrix @ invert(matrix)).abs().sum(-1).max())
    expected = both(torch.linalg.inv)
    error = float((both() - expected).norm() / expected.norm())
    times, device = ["–", "–", "–"], matrix.device.type
    if residual <= tolerance(method) and error <= GRADIENT_TOLERANCE.get(method, TOLERANCE):
        runs = (lambda: invert(matrix.detach()), both, recorded(both) if device == "cuda" else None)
        times = [f"{milliseconds(run, device, repetitions):.3f}" if run else "–" for run in runs]
    return [f"{residual:.1e}", f"{error:.1e}", *times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--largest", type=int, default=4096, help="leaves larger matrices out")
    parser.add_argument("--leaves", type=int, nargs="+", default=[_LEAF], help="matrices that elimination does not cut")
    given = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    name = torch.cuda.get_device_name() if given.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; milliseconds, median of {given.repetitions}\n")
    print("| matrices | method | ‖I − A X‖∞ | gradient error | forward | forward + backward | both, recorded |")
    print("|---|---|---|---|---|---|---|")
    for blocks, size in ((blocks, size) for blocks, size in SIZES if size <= given.largest):
        matrix = matrices(blocks, size, given.device).requires_grad_()
        start = torch.linalg.inv(matrix.detach() + 0.05 * torch.randn_like(matrix) / size)
        weight = torch.randn_like(matrix)
        for method, invert in ways(start, given.device == "cpu", given.leaves).items():
            entries = [f"{blocks} × {size}²", method, *figures(method, invert, matrix, weight, given.repetitions)]
            print(f"| {' | '.join(entries)} |", flush=True)


if __name__ == "__main__":
    main()
