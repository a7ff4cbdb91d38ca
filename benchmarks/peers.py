"""Other packages' products with a 4-bit weight, each as x ↦ calls over copies of the same weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from aq_lightning.kernels.packed import Operands, PackedWeight
from aq_lightning.qtensor import QTensor
from aq_lightning.scheme import Grid

Calls = Callable[[Tensor], list[Callable[[], Tensor]]]


class Weights:
    """A random weight on the GPU: its codes, its exact value, and what every peer makes of it."""

    def __init__(
        self, rows: int, columns: int, bits: int, group: int, symmetric: bool, copies: Callable[[int], int]
    ) -> None:
        torch.manual_seed(rows + columns)
        grid = Grid(bits, group, symmetric)
        codes = torch.randint(grid.levels, (rows, columns), dtype=torch.uint8, device="cuda")
        scale = torch.empty(rows, columns // group, device="cuda").uniform_(0.005, 0.02).half()
        zero = torch.full_like(scale, grid.levels // 2, dtype=torch.uint8)
        if not symmetric:
            zero.random_(grid.levels)
        self.quantized = QTensor(codes, scale, zero, grid)
        self.copies = copies

    @cached_property
    def reference(self) -> Tensor:
        """Ŵ, float32."""
        return self.quantized.dequantize(torch.float32)

    def packed(self) -> list[Operands]:
        """Ours."""
        weight = PackedWeight.pack(self.quantized)
        first = Operands(weight.words, weight.scales, weight.grid.bits)
        more = range(self.copies(first.words.nbytes) - 1)
        return [first] + [first._replace(words=first.words.clone(), scales=first.scales.clone()) for _ in more]

    def expect_4_bits(self) -> None:
        """Most peers have nothing else."""
        if self.quantized.grid.bits != 4:
            raise NotImplementedError("4 bits only")


def cublas(weights: Weights) -> tuple[Calls, float]:
    """Half precision, no integers."""
    first = weights.reference.half()
    kept = [first] + [first.clone() for _ in range(weights.copies(first.nbytes) - 1)]
    return lambda x: [lambda w=w: functional.linear(x, w) for w in kept], 2e-3


def tinygemm(weights: Weights) -> tuple[Calls, float]:
    """``aten._weight_int4pack_mm``, bfloat16."""
    weights.expect_4_bits()
    q = weights.quantized
    pairs = (q.codes[:, ::2] << 4 | q.codes[:, 1::2]).contiguous()
    words = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    scale = q.scale.float()
    grids = torch.stack([scale, (8 - q.zero.float()) * scale], -1).transpose(0, 1).bfloat16().contiguous()
    kept = [(words.clone(), grids.clone()) for _ in range(weights.copies(words.nbytes))]
    group = q.grid.group_size

    def calls(x: Tensor) -> list[Callable[[], Tensor]]:
        half = x.bfloat16()
        return [lambda w=w, g=g: torch.ops.aten._weight_int4pack_mm(half, w, group, g) for w, g in kept]

    return calls, 1e-2


def gemlite(weights: Weights) -> tuple[Calls, float]:
    """GemLite with the configurations that it ships."""
    import gemlite as package

    weights.expect_4_bits()
    q, kept = weights.quantized, []
    for _ in range(weights.copies(q.codes.numel() // 2)):
        layer = package.GemLiteLinear(
            4, q.grid.group_size, q.codes.shape[1], q.codes.shape[0], package.DType.FP16, package.DType.FP16
        )
        layer.pack(q.codes, q.scale.reshape(-1, 1), q.zero.half().reshape(-1, 1), None)
        kept.append(layer)
    return lambda x: [lambda layer=layer: layer(x) for layer in kept], 1e-2


def humming(weights: Weights) -> tuple[Calls, float]:
    """humming-kernels, symmetric; it rounds the weight to its own grid, hence the tolerance."""
    from humming.layer import HummingLayer

    weights.expect_4_bits()
    q, kept = weights.quantized, []
    for _ in range(weights.copies(q.codes.numel() // 2)):
        layer = HummingLayer(
            shape_n=q.codes.shape[0], shape_k=q.codes.shape[1], torch_dtype=torch.float16,
            weight_config={"dtype": "int4", "weight_scale_group_size": q.grid.group_size},
        ).cuda()  # fmt: skip
        layer.load_from_unquantized(weights.reference.half())
        layer.transform()
        kept.append(layer)
    return lambda x: [lambda layer=layer: layer(x) for layer in kept], 0.2


def int8(weights: Weights) -> tuple[Calls, float]:
    """``torch._int_mm`` on integers of 8 bits, nothing scaled: the bare product, hence no tolerance."""
    first = torch.randint(-127, 128, tuple(weights.reference.shape), dtype=torch.int8, device="cuda")
    kept = [first] + [first.clone() for _ in range(weights.copies(first.nbytes) - 1)]

    def calls(x: Tensor) -> list[Callable[[], Tensor]]:
        codes = torch.randint(-127, 128, tuple(x.shape), dtype=torch.int8, device="cuda")
        return [lambda w=w: torch._int_mm(codes, w.T) for w in kept]

    return calls, float("inf")


def bitsandbytes(weights: Weights) -> tuple[Calls, float]:
    """bitsandbytes NF4, blocks of 64, which is another grid, hence the tolerance."""
    import bitsandbytes as package

    weights.expect_4_bits()
    kept = [
        package.functional.quantize_4bit(weights.reference.half(), blocksize=64, quant_type="nf4")
        for _ in range(weights.copies(weights.quantized.codes.numel() // 2))
    ]
    return lambda x: [lambda w=w, s=s: package.matmul_4bit(x, w.t(), s) for w, s in kept], 0.2


PEERS: dict[str, Callable[[Weights], tuple[Calls, float]]] = {
    "fp16": cublas,
    "tinygemm": tinygemm,
    "gemlite": gemlite,
    "humming": humming,
    "bitsandbytes nf4": bitsandbytes,
}
INTEGER_PEERS = {"fp16": cublas, "int8 torch._int_mm": int8}
"""Those whose activations are integers, and the measure of all."""
