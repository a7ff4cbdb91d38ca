"""Codes of packed words as operands of a product: one shift, mask and fused multiply–add for two codes.

The bits of a code, set into the mantissa of a number whose unit they are, read as ``base + code``: 0x6400 is 1024 in
float16 and 0x4300 is 128 in bfloat16. Codes further up in the mantissa read as ``base + 2^r code``, which the factor of
the fused multiply–add brings back. Every step is exact. Two words are taken at once, as one 32-bit register. Plain
arithmetic gives the same numbers where there is no such instruction: on other devices, in the interpreter, for codes
across two words and for 8 bits in bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

_WORD = 16  # bits
_EXPONENT = {"fp16": (10, 15, 0x6400), "bf16": (7, 127, 0x4300)}  # mantissa bits, bias, the base's bits


@triton.constexpr_function
def whole(bits, code, dtype):
    """Whether an instruction reads the code: it lies in one word and fits the mantissa."""
    return bits * code % _WORD + bits <= _WORD and bits <= _EXPONENT[dtype][0]


@triton.constexpr_function
def plane(bits, code):
    """The word in which a code begins."""
    return bits * code // _WORD


@triton.constexpr_function
def start(bits, code):
    """The bit of its word at which a code begins."""
    return bits * code % _WORD


@triton.constexpr_function
def common(group, step):
    """Chunks of a step that share a scale; group 0: all."""
    while group:  # math.gcd cannot be called here
        step, group = group, step % group
    return step


@triton.constexpr_function
def together(same, most):
    """Chunks of one product: a power of 2, at most so many, that divides those that share a scale."""
    return min(same & -same, most)


@triton.constexpr_function
def raised(bits, code, dtype):
    """r: bits by which the code stands above the mantissa's end when it is masked."""
    return start(bits, code) if start(bits, code) + bits <= _EXPONENT[dtype][0] else 0


@triton.constexpr_function
def base(bits, code, dtype):
    """What is to be taken from a masked code, times ``2^−r``."""
    return float(2 ** (_EXPONENT[dtype][0] - raised(bits, code, dtype)))


@triton.constexpr_function
def instructions(bits, code, dtype, scaled):
    """PTX: (two words, −(base + zero point) twice[, scale twice]) → two numbers."""
    mantissa, bias, magic = _EXPONENT[dtype]
    r = raised(bits, code, dtype)
    mask = (2**bits - 1 << r) * 0x10001
    factor = (bias - r << mantissa) * 0x10001
    moved = f"shr.u32 t, $1, {start(bits, code) - r};" if start(bits, code) != r else "mov.b32 t, $1;"
    scale = f"mul.rn.{dtype_pair(dtype)} $0, $0, $3;" if scaled else ""
    return f"""{{ .reg .b32 t, f; {moved}
        lop3.b32 t, t, {mask}, {magic * 0x10001}, 0xEA;
        mov.b32 f, {factor};
        fma.rn.{dtype_pair(dtype)} $0, t, f, $2; {scale} }}"""


@triton.constexpr_function
def dtype_pair(dtype):
    """PTX's name of two numbers in a register."""
    return {"fp16": "f16x2", "bf16": "bf16x2"}[dtype]


@triton.jit
def _twice(b_row, b_w, DTYPE: tl.constexpr):
    """A number for each row, in DTYPE, as each of its words reads it."""
    return tl.broadcast_to(tl.expand_dims(b_row.to(tl.float16 if DTYPE == "fp16" else tl.bfloat16), -1), b_w.shape)


@triton.jit
def beside(b_left, b_right):
    """[R, C] twice, as [R, 2 C]; in the registers from which tensor cores read, nothing moves."""
    b_both = tl.permute(tl.join(b_left, b_right), (0, 2, 1))
    return tl.reshape(b_both, (b_left.shape[0], 2 * b_left.shape[1]))


@triton.jit
def operand(
    b_w, b_next, b_z, b_s,
    BITS: tl.constexpr, CODE: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Code minus zero point, times the scale if SCALED, in DTYPE [R, C]; of several tiles [P, R, C].

    Args:
        b_w, b_next: words in which the code begins and ends, int16 [R, C].
        b_z, b_s: zero points and scales of the rows, float32 [R].
        BITS, CODE: width and number of the code.
        DTYPE: fp16 or bf16.
        SCALED: whether to multiply.
        ASSEMBLY: whether PTX may be used.
    """
    if ASSEMBLY and whole(BITS, CODE, DTYPE):
        b_offset = _twice(-base(BITS, CODE, DTYPE) - b_z, b_w, DTYPE)
        b_factor = _twice(b_s, b_w, DTYPE) if SCALED else b_offset
        asm: tl.constexpr = instructions(BITS, CODE, DTYPE, SCALED)
        if DTYPE == "fp16":
            return tl.inline_asm_elementwise(asm, "=r,r,r,r", [b_w, b_offset, b_factor], tl.float16, True, 2)
        else:
            return tl.inline_asm_elementwise(asm, "=r,r,r,r", [b_w, b_offset, b_factor], tl.bfloat16, True, 2)
    else:
        b_string = b_w.to(tl.int32) & 0xFFFF
        if start(BITS, CODE) + BITS > 16:
            b_string = b_string | (b_next.to(tl.int32) << 16)
        b_u = (b_string >> start(BITS, CODE)) & (2**BITS - 1)
        b_v = b_u.to(tl.float32) - tl.expand_dims(b_z, -1)
        if SCALED:
            b_v = b_v * tl.expand_dims(b_s, -1)
        return b_v.to(tl.float16 if DTYPE == "fp16" else tl.bfloat16)
