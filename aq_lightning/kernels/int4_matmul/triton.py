"""The product with a packed weight on a GPU: words are unpacked in the registers from which tensor cores read them.

``Yᵀ = Ŵ Xᵀ``: the weight is the left operand of every product and tokens are the narrow right one. Groups are summed in
float32 and scaled there, or the weight is scaled before the product where tokens are many. Blocks that share rows and
tokens but not columns leave their sums in a workspace; whichever comes last adds them up, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aq_lightning.kernels.dispatch import Compute, Launch
from aq_lightning.kernels.int4_matmul.config import Config
from aq_lightning.kernels.int4_matmul.overlap import start_early
from aq_lightning.kernels.int4_matmul.tiles import grid_of_rows, store, weight_of, weights_of
from aq_lightning.kernels.int4_matmul.unpack import common, together
from aq_lightning.kernels.packed import Operands, tiling
from aq_lightning.kernels.workspace import Workspace, last_of

_JOINED = 4  # chunks of one product at most: their operands fill a quarter of a thread's registers
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def _settled(b_sum, CARRIED: tl.constexpr):
    """The same sums, waited for if the next step of a loop adds to them: products still pending when it begins would be
    run one by one."""
    if CARRIED:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [b_sum], tl.float32, True, 1)
    else:
        return b_sum


@triton.jit
def _sum(
    p_w, p_x, scales, o_n, o_in, m_n, m_m, b_z, b_s, first, last, spans, N, K,
    BITS: tl.constexpr, PLANES: tl.constexpr, CODES: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr, RAGGED: tl.constexpr, R: tl.constexpr, T: tl.constexpr, UNROLL: tl.constexpr,
    SAME: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """The products of steps ``first`` to ``last``, added up, float32 [R, T]; SAME: chunks that share a scale."""
    STEP: tl.constexpr = UNROLL * CODES
    b_y = tl.zeros([R, T], tl.float32)
    for i_step in tl.range(first, last, num_stages=STAGES):
        for begin in tl.static_range(0, STEP, SAME):
            if GROUP != 0:
                i_group = (i_step * STEP + begin) // GROUP
                m_s = m_n & (tl.full([R], i_group * (GROUP * CHUNK), tl.int32) < K)
                b_s, b_z = grid_of_rows(scales + i_group * N + o_n, m_s)
            b_sum = b_y if GROUP == 0 or SCALED else tl.zeros([R, T], tl.float32)
            for chunk in tl.static_range(begin, begin + SAME, WIDE):
                o_k = (i_step * STEP + chunk) * CHUNK
                m_x = m_m[None, :] & (o_k + o_in < K)[:, None] if RAGGED else m_m[None, :]
                b_x = tl.load(p_x + o_k, mask=m_x, other=0.0)  # [WIDE · CHUNK, T]
                b_w = weights_of(
                    p_w, i_step * UNROLL, chunk, spans, b_z, b_s,
                    BITS, PLANES, CODES, CHUNK, WIDE, DTYPE, SCALED, ASSEMBLY,
                )  # fmt: skip
                b_sum = tl.dot(b_w, b_x, b_sum)
            b_y = b_sum if GROUP == 0 or SCALED else b_y + b_sum * b_s[:, None]
        b_y = _settled(b_y, ASSEMBLY and (GROUP == 0 or SCALED))
    return b_y


@triton.jit(do_not_specialize=["M", "spans", "steps", "splits"])
def _int4_matmul_kernel(
    x, words, scales, bias, y, partial, counter,
    M, N, K, spans, steps, splits,
    BITS: tl.constexpr, PLANES: tl.constexpr, CODES: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, UNROLL: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, SCALED: tl.constexpr, JOINED: tl.constexpr, ASSEMBLY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A tile [R, T] of Yᵀ, R rows of the weight and T tokens, over ``steps`` steps of UNROLL tiles of columns.

    GROUP: chunks that share a scale, 0 if a whole row does. SCALED: scales meet the weight, not the sums. JOINED:
    chunks of one product at most.
    """
    SAME: tl.constexpr = common(GROUP, UNROLL * CODES)  # chunks of a step that share a scale
    WIDE: tl.constexpr = together(SAME, JOINED)
    i_m, i_n, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n, o_m, o_c = i_n * R + tl.arange(0, R), i_m * T + tl.arange(0, T), tl.arange(0, CHUNK)
    m_n, m_m, o_in = o_n < N, o_m < M, tl.arange(0, WIDE * CHUNK)
    o_tile = tl.minimum(o_n // 64, (N - 1) // 64)  # rows behind the last tile read it again; nothing of theirs is kept
    p_w = words + (o_tile * (spans * PLANES * 64 * CHUNK) + (o_n % 64) * CHUNK)[:, None] + o_c[None, :]
    p_x = x + o_m[None, :].to(tl.int64) * K + o_in[:, None]
    first, last = i_k * steps, tl.minimum((i_k + 1) * steps, tl.cdiv(spans, UNROLL))
    if OVERLAP:
        start_early(words, first * UNROLL, tl.minimum(last * UNROLL, spans), spans, N, R, CHUNK, PLANES * 64 * CHUNK)
    b_s, b_z = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
    if GROUP == 0:
        b_s, b_z = grid_of_rows(scales + o_n, m_n)
    b_y = _sum(
        p_w, p_x, scales, o_n, o_in, m_n, m_m, b_z, b_s, first, last, spans, N, K,
        BITS, PLANES, CODES, CHUNK, GROUP, DTYPE, RAGGED, R, T, UNROLL, SAME, WIDE, STAGES, SCALED, ASSEMBLY,
    )  # fmt: skip
    if not SPLIT:
        store(b_y, b_s, bias, y, o_n, o_m, N, M, GROUP == 0, HAS_BIAS)
    else:
        i_tile = i_n * tl.num_programs(0) + i_m
        p_partial = partial + i_tile.to(tl.int64) * (splits * R * T) + tl.arange(0, R)[:, None] * T
        p_partial += tl.arange(0, T)[None, :]
        tl.store(p_partial + i_k * (R * T), b_y)
        if last_of(counter + i_tile, splits):
            b_all = tl.zeros([R, T], tl.float32)
            for split in range(splits):
                b_all += tl.load(p_partial + split * (R * T), cache_modifier=".cg")
            store(b_all, b_s, bias, y, o_n, o_m, N, M, GROUP == 0, HAS_BIAS)


@triton.jit
def _dequantize_kernel(
    words, scales, weight, N, K, spans,
    BITS: tl.constexpr, PLANES: tl.constexpr, CODES: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """One tile of Ŵ."""
    i_span, i_tile = tl.program_id(0), tl.program_id(1)
    o_n, o_c = i_tile * 64 + tl.arange(0, 64), tl.arange(0, CHUNK)
    o_w = (i_tile * spans + i_span) * (PLANES * 64 * CHUNK)
    p_tile = words + o_w + (tl.arange(0, 64) * CHUNK)[:, None] + o_c[None, :]
    p_y = weight + o_n[:, None].to(tl.int64) * K + o_c[None, :]
    for code in tl.static_range(CODES):
        o_k = (i_span * CODES + code) * CHUNK
        i_group = 0 if GROUP == 0 else o_k // (GROUP * CHUNK)
        m_s = (o_n < N) & (tl.full([64], o_k, tl.int32) < K)
        b_s, b_z = grid_of_rows(scales + i_group * N + o_n, m_s)
        b_w = weight_of(p_tile, b_z, b_s, BITS, code, CHUNK, DTYPE, False, ASSEMBLY).to(tl.float32) * b_s[:, None]
        tl.store(p_y + o_k, b_w.to(weight.dtype.element_ty), mask=(o_n < N)[:, None] & (o_k + o_c < K)[None, :])


def int4_matmul(x: Tensor, weight: Operands, bias: Tensor | None, config: Config) -> Tensor:
    """As :func:`naive.int4_matmul`, with blocks of the given sizes.

    Args:
        x: float16 or bfloat16 (…, K).
        weight: the packed tensors.
        bias: (N); None: none.
        config: how to cut the work.
    """
    return plan(x, weight, bias, config)(x, weight.words, weight.scales, bias)


def plan(x: Tensor, weight: Operands, bias: Tensor | None, config: Config) -> Compute:
    """:func:`int4_matmul` of (x, words, scales, bias) that look like these."""
    columns, (groups, rows) = x.shape[-1], weight.scales.shape
    tokens, shape, constants = x.shape[:-1].numel(), (*x.shape[:-1], rows), _constants(weight, columns, x.dtype)
    if config.dequantize:
        write = _dequantize(weight, columns, constants)

        def dequantized(x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
            dense = x.new_empty(rows, columns)
            write(words, scales, dense)
            return torch.nn.functional.linear(x, dense, bias if bias is None else bias.to(x))

        return dequantized
    step = config.unroll * weight.span
    steps = triton.cdiv(triton.cdiv(columns, step), config.splits)
    grid = triton.cdiv(tokens, config.tokens), triton.cdiv(rows, config.rows), config.splits
    workspace = Workspace(grid, config.rows * config.tokens)
    launch = Launch(
        _int4_matmul_kernel, grid,
        (tokens, rows, columns, weight.words.shape[1], steps, config.splits),
        {
            **constants, "HAS_BIAS": bias is not None, "RAGGED": columns % step != 0,
            "R": config.rows, "T": config.tokens, "UNROLL": config.unroll, "SPLIT": config.splits > 1,
            "STAGES": config.stages, "SCALED": config.scaled and groups > 1, "OVERLAP": config.overlap,
            "JOINED": _JOINED if config.joined else 1,
        },
        **config.options,
    )  # fmt: skip

    def multiplied(x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(shape)
        launch(x.contiguous(), words, scales, bias, y, *workspace.take(x.device))
        return y

    return multiplied


def dequantize(weight: Operands, columns: int, dtype: torch.dtype) -> Tensor:
    """Ŵ, (N, K) in ``dtype``: the exact value rounded once."""
    out = torch.empty(weight.scales.shape[1], columns, dtype=dtype, device=weight.words.device)
    _dequantize(weight, columns, _constants(weight, columns, dtype))(weight.words, weight.scales, out)
    return out


def _dequantize(weight: Operands, columns: int, constants: dict[str, object]) -> Launch:
    """Writes Ŵ: (words, scales, Ŵ)."""
    down, across = weight.words.shape[:2]
    numbers = weight.scales.shape[1], columns, across
    return Launch(_dequantize_kernel, (across, down), numbers, constants)


def _constants(weight: Operands, columns: int, dtype: torch.dtype) -> dict[str, object]:
    """What both kernels are compiled for."""
    codes, planes = tiling(weight.bits)
    groups, chunk = weight.scales.shape[0], weight.words.shape[4]
    return {
        "BITS": weight.bits,
        "PLANES": planes,
        "CODES": codes,
        "CHUNK": chunk,
        "GROUP": 0 if groups == 1 else columns // groups // chunk,
        "DTYPE": _DTYPES[dtype],
        "ASSEMBLY": weight.words.is_cuda and torch.version.cuda is not None,
    }
