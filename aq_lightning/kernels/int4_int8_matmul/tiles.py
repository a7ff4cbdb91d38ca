"""A tile of packed bytes, unpacked in registers; and how one of the answer is stored."""

from __future__ import annotations

import triton
import triton.language as tl

from aq_lightning.kernels.int4_matmul.unpack import beside


@triton.constexpr_function
def instructions(bits, code, half):
    """PTX: (four bytes, zero point four times) → code − zero point four times; with a half, only bytes 2c + half."""
    mask = (2**bits - 1) * 0x01010101
    kept = 0xFFFFFFFF if half < 0 else 0x00FF00FF << 8 * half
    return f"""{{ .reg .b32 t; shr.u32 t, $1, {bits * code};
        lop3.b32 t, t, {mask}, 0x80808080, 0xEA;
        sub.u32 t, t, $2;
        lop3.b32 $0, t, 0x80808080, {kept}, 0x28; }}"""


@triton.jit
def _operand(b_bytes, b_z, BITS: tl.constexpr, CODE: tl.constexpr, HALF: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Code minus zero point, int8 [R, 2 · chunk], of several tiles [P, R, 2 · chunk]; where HALF is 0 or 1, zero in the
    bytes of the other half."""
    b_z = tl.broadcast_to(tl.expand_dims(b_z.to(tl.int8), -1), b_bytes.shape)
    if ASSEMBLY:
        asm: tl.constexpr = instructions(BITS, CODE, HALF)
        return tl.inline_asm_elementwise(asm, "=r,r,r", [b_bytes, b_z], tl.int8, True, 4)
    else:
        b_u = ((b_bytes.to(tl.int32) >> (BITS * CODE)) & (2**BITS - 1)) - b_z.to(tl.int32)
        if HALF >= 0:
            o_e = tl.arange(0, b_bytes.shape[-1])
            b_u *= (o_e % 2 == HALF).to(tl.int32)
        return b_u.to(tl.int8)


@triton.jit
def operands(
    b_bytes, b_z, BITS: tl.constexpr, CODE: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """WIDE codes from CODE on, side by side, int8 [R, WIDE · 2 · chunk]."""
    if WIDE == 1:
        return _operand(b_bytes, b_z, BITS, CODE, HALF, ASSEMBLY)
    else:
        b_left = operands(b_bytes, b_z, BITS, CODE, WIDE // 2, HALF, ASSEMBLY)
        return beside(b_left, operands(b_bytes, b_z, BITS, CODE + WIDE // 2, WIDE // 2, HALF, ASSEMBLY))


@triton.jit
def store(b_y, b_s, scale, bias, y, o_n, o_m, N, M, ROW_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Stores sums [R, T], scaled by tokens (and rows), as Y."""
    if ROW_SCALE:
        b_y = b_y * b_s[:, None]
    b_y = b_y * tl.load(scale + o_m, mask=o_m < M, other=0.0)[None, :]
    if HAS_BIAS:
        b_y += tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
    p_y = y + o_m[None, :].to(tl.int64) * N + o_n[:, None]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=(o_m < M)[None, :] & (o_n < N)[:, None])
