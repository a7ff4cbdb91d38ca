"""Writes tests/rounders/llmcompressor.safetensors: a fixed layer and the codes that llm-compressor's GPTQ gives it.

It needs packages that the project does not depend on, in versions that go together; their own dependencies are not
used:

    python -m pip install --no-deps --target SOMEWHERE llmcompressor==0.14.0.1 compressed-tensors==0.19.0
    PYTHONPATH=SOMEWHERE:. python benchmarks/golden_gptq.py
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import save_file
from torch import Tensor

from aq_lightning.quantizers import MinMax
from aq_lightning.scheme import Grid

TARGET = Path(__file__).resolve().parents[1] / "tests" / "rounders" / "llmcompressor.safetensors"
OUT, IN, TOKENS = 32, 64, 500
GRIDS = (Grid(4, 16, True), Grid(3, 16), Grid(4, None, True), Grid(2, 32))


def codes(weight: Tensor, second: Tensor, grid: Grid, act_order: bool) -> Tensor:
    """llm-compressor's codes, shifted to start at 0: uint8 (out, in)."""
    start = MinMax(grid, (OUT, IN), torch.float32).quantize(weight.double())
    middle = 2 ** (grid.bits - 1)  # llm-compressor's codes are signed
    arguments = QuantizationArgs(
        num_bits=grid.bits,
        symmetric=grid.symmetric,
        strategy="channel" if grid.group_size is None else "group",
        group_size=grid.group_size,
        actorder="weight" if act_order else None,
    )
    scale, zero = start.scale, start.zero.float() - middle  # (out, groups) each
    rounded, _, fallback = quantize_weight(
        weight[None].clone(), second[None].clone(), scale[None], zero[None], None, arguments
    )
    assert not fallback.any()
    wide, zeros = (each.repeat_interleave(IN // scale.shape[1], 1) for each in (scale, zero))
    return ((rounded[0] / wide).round() + zeros + middle).to(torch.uint8)


def main() -> None:
    """Makes the layer and writes everything."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, IN) @ (torch.randn(IN, IN) / IN**0.5) * torch.linspace(3, 0.3, IN)[torch.randperm(IN)]
    weight = 0.05 * torch.randn(OUT, IN)
    tensors = {"weight": weight, "second": x.T @ x / TOKENS}
    for grid in GRIDS:
        for act_order in (True, False):
            name = f"{grid.bits} {grid.group_size} {grid.symmetric} {act_order}"
            tensors[name] = codes(weight, tensors["second"], grid, act_order)
    made_by = {name: version(name) for name in ("llmcompressor", "compressed-tensors")}
    save_file(tensors, TARGET, made_by)


if __name__ == "__main__":
    main()
