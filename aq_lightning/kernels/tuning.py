"""Measuring which block sizes are fastest on this GPU: done once, outside serving, and kept in a table."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import replace
from functools import cache
from itertools import cycle, islice
from itertools import product as combinations
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from aq_lightning.kernels.int4_int8_matmul import naive as int4_int8_matmul
from aq_lightning.kernels.int4_matmul import naive as int4_matmul
from aq_lightning.kernels.int4_matmul.config import Config, Product, read, save, shared
from aq_lightning.kernels.packed import ROWS, Operands, tiling

COLD = 200 * 2**20
"""Bytes of weights between two uses of one: more than any cache holds."""
_SHARED = 227 * 1024  # bytes of shared memory that a block may have on sm90
_CLOSE = 4  # of the fastest configurations are measured again, longer
_WRONG = 1e-2  # relative error at which a configuration does not count: rounding of bfloat16 is 4e-3


def candidates(product: Product) -> list[Config]:
    """Configurations worth measuring for a product."""
    found = [
        Config(rows, tokens, unroll, splits, stages, warps, scaled, joined=joined)
        for tokens, blocks, depths, scalings in _kinds(product.tokens)
        for (rows, warps), (unroll, stages), scaled in combinations(blocks, depths, scalings)
        for joined in (False, True)
        if warps % 4 == 0 or not joined
        for splits in (1, 2, 3, 4, 6, 8)
        if _sensible(product, rows, tokens, unroll, splits, warps)
    ]
    if product.activation_bits < 16:  # sums of a group are scaled, whatever the tokens
        found = [*dict.fromkeys(replace(config, scaled=False) for config in found), *_divided(product)]
    elif product.tokens >= 64:
        found.append(Config(dequantize=True))
    return [config for config in found if shared(config, product) <= _SHARED]


def _kinds(tokens: int) -> Iterator[tuple[int, list[tuple[int, int]], list[tuple[int, int]], list[bool]]]:
    """Tokens of a block → (rows, warps), (unroll, stages) and scalings that go with them.

    What is left out compiles, on Hopper, to a quarter more instructions for each weight than another number of warps
    for the same rows (few tokens), or keeps registers in memory.
    """
    deep, even, shallow = [(1, 4), (1, 6), (2, 4)], [(1, 3), (1, 4)], [(1, 2), (1, 3), (1, 4)]
    if tokens <= 16:
        yield 8 if tokens <= 8 else 16, [(16, 1), (32, 1), (64, 2), (128, 4)], deep, [False]
    elif tokens <= 32:
        yield 16, [(64, 2), (128, 4)], deep, [False]
    if 16 < tokens <= 64:
        yield 32, [(64, 4), (128, 4), (256, 8)], even, [False]
    if 32 < tokens <= 128:
        yield 64, [(64, 4), (128, 4), (256, 8)], even, [False, True]
    if tokens > 64:
        yield 128, [(64, 4), (128, 8)], shallow, [False]
        yield 128, [(128, 4), (128, 8), (256, 8)], shallow, [True]
        yield 64, [(128, 4), (256, 8)], even, [False]
    if tokens > 128:
        yield 256, [(128, 8)], shallow[:2], [True]


def _divided(product: Product) -> Iterator[Config]:
    """Blocks whose warps divide the columns, for few tokens; sums of a warp fit its registers."""
    tokens = next((width for width in (8, 16, 32, 64) if product.tokens <= width), None)
    if tokens is None:
        return
    for rows, warps, stages in combinations((16, 32, 64), (4, 8), (3, 4)):
        if rows * tokens <= 2048 and product.columns >= 2 * 128 * warps:
            yield Config(rows, tokens, stages=stages, warps=warps, divided=True)


def _sensible(product: Product, rows: int, tokens: int, unroll: int, splits: int, warps: int) -> bool:
    """Whether blocks are enough for a large GPU, not too many for it to run at once, and each has some steps."""
    blocks = -(-product.rows // rows) * -(-product.tokens // tokens) * splits
    steps = product.columns // (128 * unroll)
    return steps >= 2 * splits and (splits == 1 or (96 <= blocks and blocks * warps <= 132 * 32))


def random_operands(rows: int, columns: int, bits: int, size: int, device: str) -> Operands:
    """A packed weight of random codes, symmetric, in groups of ``size`` columns."""
    codes, planes = tiling(bits)
    chunk = 32 if codes <= 8 else 16
    shape = -(-rows // ROWS), -(-columns // (chunk * codes)), planes, ROWS, chunk
    words = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=device)
    scales = torch.empty(columns // size, rows, device=device).uniform_(0.005, 0.02).half().float()
    return Operands(words, scales.view(torch.int32) | 2 ** (bits - 1), bits)


def calls(product: Product, x: Tensor, weights: Sequence[Operands], config: Config) -> list[Callable[[], Tensor]]:
    """The product of one x with each weight; where activations are quantized, that is done already."""
    if product.activation_bits == 16:
        from aq_lightning.kernels.int4_matmul import triton

        return [lambda weight=weight: triton.int4_matmul(x, weight, None, config) for weight in weights]
    from aq_lightning.kernels.int4_int8_matmul import rounding
    from aq_lightning.kernels.int4_int8_matmul import triton as integer

    width = integer.width_of(x.shape[1], weights[0], config)
    codes, scale = rounding.quantize(x, product.activation_bits, weights[0], width)
    return [lambda weight=weight: integer.multiply(codes, scale, weight, None, config, x) for weight in weights]


def reference(product: Product, x: Tensor, weight: Operands) -> Tensor:
    """What the calls must answer, float32."""
    if product.activation_bits == 16:
        return int4_matmul.int4_matmul(x.float(), *weight)
    return int4_int8_matmul.int4_int8_matmul(x.float(), *weight, product.activation_bits)


def error(product: Product, x: Tensor, weight: Operands, config: Config, expected: Tensor) -> float:
    """Relative RMS error of a configuration, infinite if it fails."""
    from triton.errors import TritonError

    torch.full_like(expected, float("nan"), dtype=x.dtype)  # freed at once: the answer takes its place
    try:
        return _distance(calls(product, x, [weight], config)[0](), expected)
    except (TritonError, RuntimeError):
        return float("inf")


def compile_all(configs: Sequence[Config], product: Product, size: int | None, seconds: float) -> dict[Config, str]:
    """Compiles configurations in as many processes as there are processors, each on a small product that it must get
    right; the binaries stay in Triton's cache.

    Args:
        configs: ``splits`` does not matter to the compiler, beyond being 1 or not.
        product: of which the widths count.
        size: columns of a group; None: one scale a row.
        seconds: after which the rest is left out.

    Returns:
        Configuration → why it is of no use; empty: it compiled in time and is right.
    """
    ends = time.monotonic() + seconds
    workers = max(1, (os.cpu_count() or 2) - 1)
    outcomes = dict.fromkeys(configs, "not in time")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs: dict[Future[str], Config] = {pool.submit(_try, config, product, size): config for config in configs}
        try:
            for job in as_completed(jobs, timeout=max(0.0, ends - time.monotonic())):
                outcomes[jobs[job]] = str(job.exception() or "") or job.result()
        except OutOfTime:
            pool.shutdown(wait=False, cancel_futures=True)
    return outcomes


def _try(config: Config, product: Product, size: int | None) -> str:
    """Why a configuration is of no use."""
    from triton.errors import TritonError

    torch.manual_seed(0)
    weight = random_operands(256, 1024, product.bits, size or 1024, "cuda")
    x = torch.randn(config.tokens + 3, 1024, device="cuda").half()
    expected = reference(product, x, weight)
    try:
        found = _distance(calls(product, x, [weight], config)[0](), expected)
    except (TritonError, RuntimeError) as reason:
        return f"{type(reason).__name__}: {reason}"
    return "" if found < _WRONG else f"error {found:.0e}"


def _distance(y: Tensor, expected: Tensor) -> float:
    """Relative RMS, infinite if anything is not a number."""
    found = float((y.float() - expected).norm() / expected.norm())
    return found if found == found else float("inf")


def microseconds(runs: Sequence[Callable[[], object]], milliseconds: float = 10.0, rounds: int = 5) -> float:
    """Median time of one run on the device, when all are recorded one behind the other in a CUDA graph.

    Args:
        runs: the same work on data that lie apart, so that none finds its own in a cache.
        milliseconds: of a round, at least.
        rounds: whose median is taken.
    """
    graph = _recorded(runs)
    graph.replay()
    once = _elapsed(graph, 1)
    repetitions = max(1, round(milliseconds / max(once, 1e-3)))
    times = [_elapsed(graph, repetitions) / repetitions for _ in range(rounds)]
    return 1e3 * statistics.median(times) / len(runs)


@cache
def _apart() -> tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]:
    """A stream for recording, and a graph that is kept: a pool of memory lives as long as a graph that uses it, and
    graphs follow one another, so one pool serves all."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        torch.zeros(1, device="cuda")
    return stream, graph


def _recorded(runs: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All runs once to warm up, then as a graph; ``torch.cuda.graph`` would collect garbage for each of thousands."""
    graph, (stream, first) = torch.cuda.CUDAGraph(), _apart()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for run in runs:
            run()
        torch.cuda.synchronize()
        try:
            graph.capture_begin(pool=first.pool())
            try:
                for run in runs:
                    run()
            finally:
                graph.capture_end()
        except RuntimeError:
            generator.graphsafe_set_state(before)  # which otherwise believes for ever that it is being recorded
            raise
    return graph


def _elapsed(graph: torch.cuda.CUDAGraph, repetitions: int) -> float:
    """Milliseconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repetitions):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def fastest(
    product: Product, weights: Sequence[Operands], configs: Sequence[Config], seconds: float, overlap: bool
) -> tuple[Config, float] | None:
    """The fastest configuration of a product and its microseconds, among those measured in time and right.

    Args:
        product: sizes.
        weights: copies enough to be cold (:data:`COLD`).
        configs: what to measure, likeliest first.
        seconds: for all.
        overlap: whether to try starting early, too, with the fastest two.
    """
    ends = time.monotonic() + seconds
    x = torch.randn(product.tokens, product.columns, device="cuda").half()
    expected = reference(product, x, weights[0])
    cold = list(islice(cycle(weights), max(4, len(weights))))

    def measured(config: Config, milliseconds: float, rounds: int) -> float:
        try:
            return microseconds(calls(product, x, cold, config), milliseconds, rounds)
        except RuntimeError:  # what the device refuses to record is not the fastest
            return float("inf")

    times: dict[Config, float] = {}
    for config in configs:
        if time.monotonic() > ends - 0.25 * seconds and times:
            break
        if error(product, x, weights[0], config, expected) < _WRONG:
            times[config] = measured(config, 1.0, 3)
    best = sorted(times, key=times.__getitem__)[:_CLOSE]
    early = [replace(config, overlap=True) for config in best[:2] if overlap and not config.dequantize]
    best += [config for config in early if error(product, x, weights[0], config, expected) < _WRONG]
    again = {config: measured(config, 5.0, 5) for config in best}
    found = min(again.items(), key=lambda item: item[1], default=None)
    return found if found and found[1] < float("inf") else None


def merge(path: Path, product: Product, config: Config) -> None:
    """Puts one measured configuration into the table at ``path``."""
    entries = dict(read(path)) if path.is_file() else {}
    entries[product] = config
    path.parent.mkdir(parents=True, exist_ok=True)
    save(list(entries.items()), path)
