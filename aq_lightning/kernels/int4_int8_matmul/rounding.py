"""Activations rounded token by token, into the order in which a packed weight's bytes hold its codes.

Byte ``e = 2 c + h`` of code j is column ``chunk · (h · per + j) + c`` of its tile, with ``per`` codes in a byte.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aq_lightning.kernels.dispatch import Launch
from aq_lightning.kernels.fake_quantize.parts import divide
from aq_lightning.kernels.packed import Operands

_MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and subtracting it rounds half to even, below 2^22
_STRIP = 512  # columns that a warp reads at once: 16 bytes a thread from either half of a tile

Quantize = Callable[..., tuple[Tensor, Tensor]]


@triton.jit
def larger(a, b):
    """The larger of two, NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def greatest(b_x):
    """The greatest number above zero of a vector, float32, or NaN: as integers, positive numbers keep their order, and
    NaN is above them."""
    return tl.maximum(tl.max(b_x.to(tl.int32, bitcast=True), axis=0), 0).to(tl.float32, bitcast=True)


@triton.jit
def step_of(b_max, HALF: tl.constexpr):
    """A token's scale from its greatest size."""
    b_s = tl.div_rn(b_max, HALF - 0.5)
    return tl.where(b_s == 0.0, 1.1754943508222875e-38, b_s)  # the smallest normal step: codes of zeros are zero


@triton.jit
def steps_in(b_x, b_s, FUSED: tl.constexpr):
    """``b_x / b_s``, rounded once; where multiply–adds are fused, with an inverse that is computed once."""
    return divide(b_x, b_s, tl.div_rn(1.0, b_s)) if FUSED else tl.div_rn(b_x, b_s)


@triton.jit
def integers(b_x, b_s, b_least, b_most, FUSED: tl.constexpr):
    """A token's codes, int8 from integer ``b_least`` to ``b_most``: the low byte of a sum with ``1.5 · 2^23``."""
    b_u = tl.minimum(tl.maximum(steps_in(b_x, b_s, FUSED), b_least), b_most)
    return (b_u + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def place(o_k, CHUNK: tl.constexpr, PER: tl.constexpr):
    """Where column ``o_k`` lies in the order of the weight's bytes."""
    o_code = o_k // CHUNK % (2 * PER)
    o_e = o_k % CHUNK * 2 + o_code // PER
    return o_k // (2 * PER * CHUNK) * (2 * PER * CHUNK) + o_code % PER * (2 * CHUNK) + o_e


@triton.jit
def _quantize_kernel(
    x, codes, scale, K, WIDTH,
    HALF: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, OVERLAP: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """One token: its scale, and its integers from ``−HALF`` to ``HALF − 1`` in the order of the weight's bytes.

    That order takes columns from either half of a tile, SIDE columns, in turns: a thread reads a run of each, keeps
    them until the scale is known, and writes one run of bytes. Nothing is read twice or moves between threads.
    """
    i_m = tl.program_id(0).to(tl.int64)
    o, o_p = tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK)
    o_k = o // SIDE * (2 * SIDE) + o % SIDE
    p_x, p_u = x + i_m * K, codes + i_m * WIDTH
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    held = ()
    for step in tl.static_range(STEPS):
        o_x = step * 2 * BLOCK + o_k
        held += (tl.load(p_x + o_x, mask=o_x < K, other=0.0),)
        held += (tl.load(p_x + SIDE + o_x, mask=SIDE + o_x < K, other=0.0),)
    b_max = tl.abs(held[0])
    for i in tl.static_range(1, 2 * STEPS):
        b_max = larger(b_max, tl.abs(held[i]))
    b_s = step_of(greatest(b_max.to(tl.float32)), HALF)
    tl.store(scale + i_m, b_s)
    for step in tl.static_range(STEPS):
        b_0 = integers(held[2 * step].to(tl.float32), b_s, -HALF, HALF - 1.0, FUSED)
        b_1 = integers(held[2 * step + 1].to(tl.float32), b_s, -HALF, HALF - 1.0, FUSED)
        b_u = tl.reshape(tl.join(b_0, b_1), (2 * BLOCK,))
        tl.store(p_u + step * 2 * BLOCK + o_p, b_u, mask=step * 2 * BLOCK + o_p < WIDTH)


def warps_of(width: int) -> int:
    """Warps that hold a token: few, so that little is padding and a processor has several tokens, but enough that each
    thread keeps its share in registers."""
    strips = triton.cdiv(width, _STRIP)
    return min(triton.next_power_of_2(strips), 4 if strips <= 16 else 8 if strips <= 64 else 32)


def quantize(x: Tensor, bits: int, weight: Operands, width: int, overlap: bool = False) -> tuple[Tensor, Tensor]:
    """The activations' integers in the order of the weight's bytes, int8 (M, width), and scales, float32 (M)."""
    return quantizer(x, bits, weight, width, overlap)(x)


def quantizer(x: Tensor, bits: int, weight: Operands, width: int, overlap: bool = False) -> Quantize:
    """:func:`quantize` of what looks like x, (…, K)."""
    tokens, columns, warps = x.shape[:-1].numel(), x.shape[-1], warps_of(width)
    launch = Launch(
        _quantize_kernel, (tokens,), (columns, width),
        {"HALF": 2 ** (bits - 1), "SIDE": weight.span // 2, "BLOCK": warps * _STRIP // 2,
         "STEPS": triton.cdiv(width, warps * _STRIP), "OVERLAP": overlap, "FUSED": x.is_cuda},
        num_warps=warps, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip

    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = x.new_empty(tokens, width, dtype=torch.int8), x.new_empty(tokens, dtype=torch.float32)
        launch(x.contiguous(), codes, scale)
        return codes, scale

    return quantized
