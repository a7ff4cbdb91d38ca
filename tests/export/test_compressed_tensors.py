"""The format is symmetric: what is read is what was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.export.compressed_tensors import compress, decompress, load_dense, read, write
from aq_lightning.kernels.layout import LAYOUTS, Layout, same_in_both
from aq_lightning.qtensor import QTensor
from aq_lightning.scheme import Grid, Scheme

STORAGE = (torch.float32, torch.float16, torch.bfloat16)


def random_qtensor(rows: int, groups: int, size: int, grid: Grid, storage: torch.dtype, seed: int = 0) -> QTensor:
    """Codes and zero points over the whole grid, whatever a quantizer would choose."""
    generator = torch.Generator().manual_seed(seed)
    zero = torch.randint(grid.levels, (rows, groups), generator=generator, dtype=torch.uint8)
    return QTensor(
        codes=torch.randint(grid.levels, (rows, groups * size), generator=generator, dtype=torch.uint8),
        scale=(torch.rand(rows, groups, generator=generator) + 0.01).to(storage),
        zero=torch.full_like(zero, grid.levels // 2) if grid.symmetric else zero,
        grid=grid,
    )


def same(a: QTensor | Tensor, b: QTensor | Tensor) -> bool:
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        return a.grid == b.grid and all(same(getattr(a, part), getattr(b, part)) for part in ("codes", "scale", "zero"))
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)


@settings(deadline=None, max_examples=200)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    shape=st.tuples(st.integers(1, 45), st.integers(1, 4), st.integers(1, 45)),
    per_channel=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    storage=st.sampled_from(STORAGE),
)
def test_round_trip(
    bits: int,
    symmetric: bool,
    shape: tuple[int, int, int],
    per_channel: bool,
    layout: Layout,
    storage: torch.dtype,
) -> None:
    rows, groups, size = (shape[0], 1, shape[2]) if per_channel else shape
    grid = Grid(bits, None if per_channel else size, symmetric)
    tensor = random_qtensor(rows, groups, size, grid, storage)
    stored = compress("w", tensor, layout)
    assert all(part.is_contiguous() for part in stored.values())
    assert ("w_zero_point" in stored) != symmetric
    assert same(decompress("w", stored, grid, layout), tensor)
    # Without the note the layout is found from the shapes, or asked for where two readings would differ.
    other = compress("w", tensor, LAYOUTS[1 - LAYOUTS.index(layout)])
    alike = all(stored[part].shape == other[part].shape for part in stored)
    straddles = not (same_in_both(groups * size, bits) and (symmetric or same_in_both(rows, bits)))
    if alike and straddles:
        with pytest.raises(RequestError, match="got one that fits both in w: name it"):
            decompress("w", stored, grid)
    else:
        assert same(decompress("w", stored, grid), tensor)


def test_stored_shapes() -> None:
    tensor = random_qtensor(21, 3, 32, Grid(3, 32), torch.float16)
    shapes = {name: (part.dtype, tuple(part.shape)) for name, part in compress("a.weight", tensor, "dense").items()}
    assert shapes == {
        "a.weight_packed": (torch.int32, (21, 9)),
        "a.weight_scale": (torch.float16, (21, 3)),
        "a.weight_zero_point": (torch.int32, (2, 3)),
        "a.weight_shape": (torch.int64, (2,)),
    }
    assert compress("a.weight", tensor, "padded")["a.weight_packed"].shape == (21, 10)


def test_compress_refuses_what_no_client_reads() -> None:
    tensor = random_qtensor(4, 2, 16, Grid(4, 16, symmetric=True), torch.float16)
    with pytest.raises(RequestError, match="symmetric grid of 4 bits is 8, got others in w"):
        compress("w", replace(tensor, zero=tensor.zero - 1))
    for value in (float("inf"), float("nan"), 0.0):
        with pytest.raises(RequestError, match="finite and positive, got others in w"):
            compress("w", replace(tensor, scale=tensor.scale * value))


@pytest.mark.parametrize(
    ("grid", "layout", "message"),
    [
        (Grid(3, 16, symmetric=True), None, "symmetric=True is stored as .* check the scheme"),
        (Grid(3, 32), None, r"scales of w have shape \(40, 1\), got \(40, 2\)"),
        (Grid(3), None, "check the group size"),
        (Grid(6, 16), None, "Rows of 6-bit codes fill their words in layout padded or dense, got"),
        (Grid(3, 16), "dense", "Rows of 3-bit codes fill their words in layout dense, got"),
        (Grid(3, 16), "loose", "A layout is one of padded, dense, got 'loose'"),
    ],
)
def test_decompress_refuses_another_grid(grid: Grid, layout: Layout, message: str) -> None:
    stored = compress("w", random_qtensor(40, 2, 16, Grid(3, 16), torch.float16), "padded")
    with pytest.raises(RequestError, match=message):
        decompress("w", stored, grid, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["w3a16g16", "w5a8sym", "w4a4", "w8a8sym"])
def test_directory_round_trip(tmp_path: Path, name: str, layout: Layout) -> None:
    scheme = Scheme.parse(name)
    groups, size = (2, 16) if scheme.weight.group_size else (1, 32)
    shards: list[dict[str, Tensor | QTensor]] = [
        {"embed.weight": torch.randn(7, 4, dtype=torch.bfloat16), "steps": torch.arange(3)},
        {f"{k}.weight": random_qtensor(11, groups, size, scheme.weight, torch.float16, seed=k) for k in range(3)},
        {"0.bias": torch.randn(11)},
    ]
    tensors = {name: value for shard in shards for name, value in shard.items()}
    write(tmp_path / "out", {"model_type": "x"}, iter(shards), scheme, layout=layout, ignore=["lm_head", "re:.*gate$"])
    found, checkpoint = read(tmp_path / "out")
    assert found == scheme
    assert set(checkpoint) == set(tensors) and len(checkpoint) == len(tensors)
    assert all(same(checkpoint[name], value) for name, value in tensors.items())
    for dtype in (torch.float32, torch.bfloat16):
        dense = load_dense(tmp_path / "out", dtype)
        assert dense.keys() == tensors.keys()
        assert all(same(dense[name], value.dequantize(dtype)) for name, value in shards[1].items())
        assert dense["0.bias"].dtype == dtype and dense["steps"].dtype == torch.int64


def test_plain_integers_are_signed(tmp_path: Path) -> None:
    tensor = random_qtensor(3, 1, 16, Grid(8, symmetric=True), torch.float16)
    write(tmp_path / "out", {}, [{"a.weight": tensor}], Scheme.parse("w8a8sym"))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {"a.weight", "a.weight_scale"}
        assert torch.equal(file.get_tensor("a.weight"), (tensor.codes.int() - 128).to(torch.int8))


def test_write_refuses_a_grid_that_the_config_would_not_say(tmp_path: Path) -> None:
    tensor = random_qtensor(8, 2, 16, Grid(4, 16), torch.float16)
    with pytest.raises(RequestError, match=r"grid Grid\(bits=4, group_size=32.* got Grid\(bits=4, group_size=16"):
        write(tmp_path / "out", {}, [{"a.weight": tensor}], Scheme.parse("w4a16g32"))
    assert list(tmp_path.iterdir()) == []


def test_read_refuses_a_plain_model(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"holds config\.json, got"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RequestError, match="has a quantization_config, got none"):
        read(tmp_path)
