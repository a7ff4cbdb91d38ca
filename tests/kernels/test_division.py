"""Divisions in kernels: Triton's ``/`` of float32 is approximate on a GPU, and exact in its interpreter."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

KERNELS = sorted((ROOT / "aq_lightning/kernels").rglob("*.py"))
EXACT = {"_eliminate_kernel", "reciprocal"}
"""Where numbers are float64, which every GPU divides exactly, and where the quotient is corrected by its remainder."""


def divisions(source: str) -> Iterator[str]:
    """What is divided by ``/`` in kernels, if it is a block (``b_…``), not a constant."""
    for function in ast.walk(ast.parse(source)):
        kernel = isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in function.decorator_list)
        for node in ast.walk(function) if kernel and function.name not in EXACT else ():
            names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Div):
                if any(name.startswith("b_") for name in names):
                    yield ast.unparse(node)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(Path(path).relative_to(ROOT)))
def test_kernels_divide_by_div_rn(path: Path) -> None:
    assert not list(divisions(path.read_text(encoding="utf-8")))


def test_the_rule_itself() -> None:
    found = divisions("@triton.jit\ndef kernel(b_y):\n    b_z = tl.div_rn(b_y, (LEVELS - 1) / 2)\n    b_y /= 3")
    assert list(found) == ["b_y /= 3"]
