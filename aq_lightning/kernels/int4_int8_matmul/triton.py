"""Integer activations times packed weights: bytes of two or four codes are operands of integer tensor cores in place.

The bytes of a plane of words are one operand [R, 2 · chunk] for every code that a byte holds, and the activations come
in the order in which those codes lie (:mod:`rounding`). Sums are exact in int32, over a group or, where
a row has one scale, over all columns; scales of the weight, then those of the tokens, meet them in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aq_lightning.kernels.dispatch import Compute, Launch
from aq_lightning.kernels.int4_int8_matmul.divided import divided_kernel
from aq_lightning.kernels.int4_int8_matmul.rounding import quantizer
from aq_lightning.kernels.int4_int8_matmul.tiles import operands, store
from aq_lightning.kernels.int4_matmul.config import Config
from aq_lightning.kernels.int4_matmul.overlap import start_early
from aq_lightning.kernels.int4_matmul.tiles import grid_of_rows
from aq_lightning.kernels.int4_matmul.unpack import common
from aq_lightning.kernels.packed import Operands
from aq_lightning.kernels.workspace import Workspace, last_of


@triton.jit(do_not_specialize=["M", "spans", "steps", "splits"])
def _int4_int8_matmul_kernel(
    x, scale, words, scales, bias, y, partial, counter,
    M, N, K, WIDTH, spans, steps, splits,
    BITS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, UNROLL: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, JOINED: tl.constexpr, ASSEMBLY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A tile [R, T] of Yᵀ over ``steps`` steps of UNROLL tiles of columns. GROUP: chunks that share a scale, 0: all.
    JOINED: whether codes of a byte are one product."""
    BYTES: tl.constexpr = 2 * CHUNK
    PER: tl.constexpr = 8 // BITS
    CODES: tl.constexpr = 2 * PER
    SAME: tl.constexpr = common(GROUP, CODES)  # codes of a string that share a scale
    COUNT: tl.constexpr = PER if SAME == CODES else SAME  # of them in a byte
    WIDE: tl.constexpr = COUNT if JOINED else 1
    i_m, i_n, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n, o_m, o_e = i_n * R + tl.arange(0, R), i_m * T + tl.arange(0, T), tl.arange(0, BYTES)
    o_tile = tl.minimum(o_n // 64, (N - 1) // 64)
    p_w = words + (o_tile * (spans * 64 * BYTES) + (o_n % 64) * BYTES)[:, None] + o_e[None, :]
    p_x = x + o_m[None, :].to(tl.int64) * WIDTH + tl.arange(0, WIDE * BYTES)[:, None]
    first, last = i_k * steps, tl.minimum((i_k + 1) * steps, tl.cdiv(spans, UNROLL))
    if OVERLAP:
        start_early(words, first * UNROLL, tl.minimum(last * UNROLL, spans), spans, N, R, CHUNK, 64 * CHUNK, 2)
    b_s, b_z = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
    if GROUP == 0:
        b_s, b_z = grid_of_rows(scales + o_n, o_n < N)
    b_y = tl.zeros([R, T], tl.int32 if GROUP == 0 else tl.float32)
    for i_step in tl.range(first, last, num_stages=STAGES):
        for begin in tl.static_range(0, UNROLL * CODES, SAME):
            i_span = i_step * UNROLL + begin // CODES
            i_tile = tl.minimum(i_span, spans - 1)
            if GROUP != 0:
                i_group = (i_span * CODES + begin % CODES) // GROUP
                b_s, b_z = grid_of_rows(
                    scales + i_group * N + o_n, (o_n < N) & (tl.full([R], i_group * (GROUP * CHUNK), tl.int32) < K)
                )
            b_sum = b_y if GROUP == 0 else tl.zeros([R, T], tl.int32)
            for code in tl.static_range(begin % CODES % PER, begin % CODES % PER + COUNT, WIDE):
                b_bytes = tl.load(p_w + i_tile * (64 * BYTES))
                b_x = tl.load(p_x + (i_span * PER + code) * BYTES, mask=(o_m < M)[None, :], other=0)
                b_w = operands(b_bytes, b_z, BITS, code, WIDE, -1 if SAME == CODES else begin % CODES // PER, ASSEMBLY)
                b_sum = tl.dot(b_w, b_x, b_sum, out_dtype=tl.int32)
            b_y = b_sum if GROUP == 0 else b_y + b_sum.to(tl.float32) * b_s[:, None]
    b_y = b_y.to(tl.float32)
    if not SPLIT:
        store(b_y, b_s, scale, bias, y, o_n, o_m, N, M, GROUP == 0, HAS_BIAS)
    else:
        i_part = i_n * tl.num_programs(0) + i_m
        p_partial = partial + i_part.to(tl.int64) * (splits * R * T) + tl.arange(0, R)[:, None] * T
        p_partial += tl.arange(0, T)[None, :]
        tl.store(p_partial + i_k * (R * T), b_y)
        if last_of(counter + i_part, splits):
            b_all = tl.zeros([R, T], tl.float32)
            for split in range(splits):
                b_all += tl.load(p_partial + split * (R * T), cache_modifier=".cg")
            store(b_all, b_s, scale, bias, y, o_n, o_m, N, M, GROUP == 0, HAS_BIAS)


def width_of(columns: int, weight: Operands, config: Config) -> int:
    """Bytes of a token: whole steps of the product."""
    step = config.unroll * weight.span
    return triton.cdiv(columns, step) * step


def int4_int8_matmul(x: Tensor, weight: Operands, bits: int, bias: Tensor | None, config: Config) -> Tensor:
    """As :func:`naive.int4_int8_matmul`, with blocks of the given sizes.

    Args:
        x: float16 or bfloat16 (…, K).
        weight: the packed tensors, of 2 or 4 bits.
        bits: of the activations.
        bias: (N); None: none.
        config: how to cut the work; neither ``scaled`` nor ``dequantize`` matters.
    """
    return plan(x, weight, bits, bias, config)(x, weight.words, weight.scales, bias)


def plan(x: Tensor, weight: Operands, bits: int, bias: Tensor | None, config: Config) -> Compute:
    """:func:`int4_int8_matmul` of (x, words, scales, bias) that look like these."""
    quantize = quantizer(x, bits, weight, width_of(x.shape[-1], weight, config), config.overlap)
    multiply = multiplier(x, weight, bias, config)
    return lambda x, words, scales, bias: multiply(*quantize(x), words, scales, bias)


def multiply(codes: Tensor, scale: Tensor, weight: Operands, bias: Tensor | None, config: Config, x: Tensor) -> Tensor:
    """The product of what :func:`quantize` made of x, (…, N) in the dtype of x."""
    return multiplier(x, weight, bias, config)(codes, scale, weight.words, weight.scales, bias)


def multiplier(x: Tensor, weight: Operands, bias: Tensor | None, config: Config) -> Compute:
    """:func:`multiply` of (codes, scale, words, scales, bias) that look like these, made of what looks like x."""
    columns, dtype, (groups, rows), chunk = x.shape[-1], x.dtype, weight.scales.shape, weight.words.shape[4]
    tokens, shape, width = x.shape[:-1].numel(), (*x.shape[:-1], rows), width_of(columns, weight, config)
    shares = triton.cdiv(tokens, config.tokens), triton.cdiv(rows, config.rows)
    constants = {
        "BITS": weight.bits, "CHUNK": chunk, "GROUP": 0 if groups == 1 else columns // groups // chunk,
        "HAS_BIAS": bias is not None, "R": config.rows, "T": config.tokens, "STAGES": config.stages,
        "OVERLAP": config.overlap, "ASSEMBLY": x.is_cuda and torch.version.cuda is not None,
    }  # fmt: skip
    numbers = tokens, rows, columns, width, weight.words.shape[1]
    if config.divided:
        launch = Launch(divided_kernel, shares, numbers, {**constants, "PARTS": config.warps}, **config.options)

        def divided(codes: Tensor, scale: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
            y = codes.new_empty(shape, dtype=dtype)
            launch(codes, scale, words.view(torch.int8), scales, bias, y)
            return y

        return divided
    steps = triton.cdiv(width // (config.unroll * weight.span), config.splits)
    grid = *shares, config.splits
    workspace = Workspace(grid, config.rows * config.tokens)
    launch = Launch(
        _int4_int8_matmul_kernel, grid, (*numbers, steps, config.splits),
        {**constants, "UNROLL": config.unroll, "SPLIT": config.splits > 1, "JOINED": config.joined},
        **config.options,
    )  # fmt: skip

    def multiplied(codes: Tensor, scale: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        y = codes.new_empty(shape, dtype=dtype)
        launch(codes, scale, words.view(torch.int8), scales, bias, y, *workspace.take(codes.device))
        return y

    return multiplied
