"""The PTX that unpacks codes, run by a reader of its five instructions: what a GPU computes, without one."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aq_lightning.kernels.int4_int8_matmul.tiles import instructions as integer_instructions
from aq_lightning.kernels.int4_matmul.unpack import base, instructions, start, whole

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_ALL = 0xFFFFFFFF


def pairwise(dtype: torch.dtype, operation: Callable[..., Tensor]) -> Callable[..., int]:
    """An operation on two numbers in a register, computed in float64 and rounded once."""

    def run(*registers: int) -> int:
        halves = [torch.tensor([r & 0xFFFF, r >> 16], dtype=torch.int32).to(torch.int16).view(dtype) for r in registers]
        low, high = (operation(*(h.double() for h in halves)).to(dtype).view(torch.int16).int() & 0xFFFF).tolist()
        return low | high << 16

    return run


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Any function of three bits, by its truth table."""
    bits = (table >> (a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1) & 1 for i in range(32))
    return sum(bit << i for i, bit in enumerate(bits))


OPERATIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, by: a >> by,
    "lop3.b32": lop3,
    "sub.u32": lambda a, b: a - b & _ALL,
    **{
        f"{name}.rn.{pair}": pairwise(dtype, operation)
        for pair, dtype in (("f16x2", torch.float16), ("bf16x2", torch.bfloat16))
        for name, operation in (("fma", lambda a, b, c: a * b + c), ("mul", lambda a, b: a * b))
    },
}


def run(ptx: str, *inputs: int) -> int:
    """Register $0 after the instructions, given $1, $2, …"""
    registers = {f"${i}": value for i, value in enumerate(inputs, 1)}
    body = re.fullmatch(r"\{ \.reg \.b32 [\w, ]+;(.*)\}", ptx, re.DOTALL)
    assert body, ptx
    for line in filter(None, (line.strip() for line in body[1].split(";"))):
        name, arguments = line.split(maxsplit=1)
        target, *sources = (argument.strip() for argument in arguments.split(","))
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = OPERATIONS[name](*values)
    return registers["$0"]


def twice(value: float, dtype: torch.dtype) -> int:
    """A number in both halves of a register."""
    half = int(torch.tensor([value], dtype=dtype).view(torch.int16).int() & 0xFFFF)
    return half | half << 16


def halves(register: int, dtype: torch.dtype) -> list[float]:
    words = torch.tensor([register & 0xFFFF, register >> 16], dtype=torch.int32).to(torch.int16)
    return words.view(dtype).double().tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_code_minus_its_zero_point_is_exact(bits: int, dtype: str) -> None:
    words = torch.randint(2**32, (40,), dtype=torch.int64).tolist() + [0, _ALL]
    read = [code for code in range(16) if whole(bits, code, dtype)]
    assert read or (bits == 8 and dtype == "bf16")
    for code in read:
        for zero in (0, 2 ** (bits - 1), 2**bits - 1):
            offset = twice(-base(bits, code, dtype) - zero, DTYPES[dtype])
            for word in words:
                y = run(instructions(bits, code, dtype, False), word, offset)
                parts = [(word >> start(bits, code) + 16 * half & 2**bits - 1) - zero for half in (0, 1)]
                assert halves(y, DTYPES[dtype]) == parts


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scaled_code_is_rounded_once(dtype: str) -> None:
    for word in torch.randint(2**32, (40,), dtype=torch.int64).tolist():
        for code in range(4):
            offset, scale = twice(-base(4, code, dtype) - 7, DTYPES[dtype]), twice(0.0123, DTYPES[dtype])
            y = run(instructions(4, code, dtype, True), word, offset, scale)
            parts = torch.tensor([(word >> 4 * code + 16 * half & 15) - 7.0 for half in (0, 1)], dtype=torch.float64)
            expected = (parts * halves(scale, DTYPES[dtype])[0]).to(DTYPES[dtype]).double().tolist()
            assert halves(y, DTYPES[dtype]) == expected


@pytest.mark.parametrize("half", [-1, 0, 1])
@pytest.mark.parametrize("bits", [2, 4])
def test_bytes_of_codes_minus_zero_points_are_exact(bits: int, half: int) -> None:
    for word in torch.randint(2**32, (60,), dtype=torch.int64).tolist() + [0, _ALL]:
        for code in range(8 // bits):
            for zero in (0, 1, 2**bits - 1):
                y = run(integer_instructions(bits, code, half), word, zero * 0x01010101)
                got = torch.tensor([y >> 8 * byte & 0xFF for byte in range(4)], dtype=torch.uint8).view(torch.int8)
                codes = [(word >> 8 * byte + bits * code & 2**bits - 1) - zero for byte in range(4)]
                assert got.tolist() == [u if half < 0 or byte % 2 == half else 0 for byte, u in enumerate(codes)]
