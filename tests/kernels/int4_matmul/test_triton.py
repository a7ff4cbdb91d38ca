"""The kernels against the plain path; on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_close
from quantized import DEVICE, HALVES, fresh_memory_is_nan, operands, random_weight
from torch import Tensor

from aq_lightning.kernels.int4_matmul import config as table
from aq_lightning.kernels.int4_matmul import naive
from aq_lightning.kernels.int4_matmul.config import Config, Product, choose, read, rule, save, shared
from aq_lightning.kernels.packed import Operands
from aq_lightning.kernels.tuning import candidates, merge
from aq_lightning.qtensor import QTensor

ROUNDING = {torch.float16: 5e-4, torch.bfloat16: 4e-3}  # of results, and of weights that are scaled first


@pytest.fixture
def answer():
    """The kernel's answer, written over NaN: (x, weight, bias, config) → y."""

    def run(x: Tensor, weight: Operands, bias: Tensor | None, config: Config) -> Tensor:
        from aq_lightning.kernels.int4_matmul import triton

        with fresh_memory_is_nan():
            return triton.int4_matmul(x, weight, bias, config)

    return run


def inputs(tokens: int, weight: QTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, columns = weight.codes.shape
    return torch.randn(tokens, columns, device=DEVICE).to(dtype), torch.randn(rows, device=DEVICE).to(dtype)


SHAPES = [  # tokens, rows, columns, group
    (1, 64, 128, 128),
    (3, 70, 256, 64),
    (5, 130, 384, 128),
    (9, 33, 96, 32),
    (2, 20, 300, None),
    (17, 36, 80, 16),
    (4, 65, 192, 96),
]
CONFIGS = [
    Config(64, 8, stages=3),
    Config(32, 16, unroll=2, warps=2),
    Config(16, 8, splits=2, warps=1),
    Config(64, 16, splits=3),
    Config(64, 16, scaled=True),
    Config(128, 8, splits=2, warps=8, scaled=True),
    Config(64, 16, joined=True),
    Config(64, 16, splits=2, scaled=True, joined=True),
    Config(32, 8, unroll=2, joined=True),
    Config(dequantize=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_block_size_gives_the_same_product(config, shape, answer) -> None:
    """All sizes of blocks meet all shapes; dtypes and a bias take turns, so that both meet each of either."""
    turn = CONFIGS.index(config) + SHAPES.index(shape)
    dtype, (tokens, rows, columns, size) = HALVES[turn % len(HALVES)], shape
    weight = random_weight(rows, columns, 4, size, False, dtype)
    x, bias = inputs(tokens, weight, dtype)
    packed = operands(weight)
    bias = bias if turn // 2 % 2 else None
    expected = naive.int4_matmul(x.float(), *packed, bias)
    assert_close("y", expected, answer(x, packed, bias, config), ROUNDING[dtype])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scaled", [False, True])
def test_every_width_of_codes(bits, scaled, answer) -> None:
    """Each in groups, scaled before the product and behind it, and per channel; dtypes and symmetry take turns."""
    dtype, config = HALVES[(bits + scaled) % len(HALVES)], Config(32, 8, scaled=scaled)
    for columns, size in ((544, 32),) if scaled else ((544, 32), (300, None)):
        weight = random_weight(70, columns, bits, size, bool(bits // 2 % 2), dtype)
        x, _ = inputs(3, weight, dtype)
        packed = operands(weight)
        expected = naive.int4_matmul(x.float(), *packed)
        assert_close(f"{columns}", expected, answer(x, packed, None, config), ROUNDING[dtype])


@pytest.mark.parametrize(("bits", "config"), [
    (2, Config(64, 16, joined=True)),
    (3, Config(32, 8, joined=True)),
    (4, Config(32, 8, unroll=2, scaled=True, joined=True)),
    (8, Config(32, 8, unroll=2, joined=True)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("size", [128, None])
def test_joined_chunks_of_one_tile_and_of_two(bits, config, size, answer) -> None:
    weight = random_weight(70, 384, bits, size, False, torch.float16)
    x, _ = inputs(3, weight, torch.float16)
    packed = operands(weight)
    expected = naive.int4_matmul(x.float(), *packed)
    assert_close("y", expected, answer(x, packed, None, config), ROUNDING[torch.float16])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_dequantized_weight_is_rounded_once(bits: int, dtype: torch.dtype) -> None:
    from aq_lightning.kernels.int4_matmul import triton

    weight = random_weight(70, 96, bits, 32, False, dtype)
    weight.scale[0, 0] = torch.finfo(dtype).tiny / 4
    packed = operands(weight)
    assert torch.equal(triton.dequantize(packed, 96, dtype), naive.dequantize(*packed, 96).to(dtype))


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter truncates to bfloat16")
@pytest.mark.parametrize("config", [Config(64, 8), Config(64, 8, scaled=True), Config(dequantize=True)], ids=str)
@pytest.mark.parametrize(("storage", "dtype"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_scales_of_another_dtype_than_activations(config, storage, dtype, answer) -> None:
    weight = random_weight(70, 256, 4, 64, False, storage)
    x, _ = inputs(3, weight, dtype)
    packed = operands(weight)
    assert_close("y", naive.int4_matmul(x.float(), *packed), answer(x, packed, None, config), 2 * ROUNDING[dtype])


@pytest.mark.parametrize("cut", [{}, {"splits": 3}], ids=str)
def test_the_same_bits_every_time(cut: dict, answer) -> None:
    weight = random_weight(130, 768, 4, 128, False)
    x, _ = inputs(5, weight, torch.float16)
    packed, config = operands(weight), Config(16, 8, **cut)
    first = answer(x, packed, None, config)
    for _ in range(3):
        assert torch.equal(answer(x, packed, None, config), first)


def test_a_token_does_not_depend_on_its_neighbours(answer) -> None:
    weight = random_weight(64, 256, 4, 64, False)
    x, _ = inputs(11, weight, torch.float16)
    packed, config = operands(weight), Config(64, 16)
    alone = torch.cat([answer(row[None], packed, None, config) for row in x])
    assert torch.equal(answer(x, packed, None, config), alone)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("columns", [128, 160])
def test_infinities_stay_in_their_token_and_row(columns: int, answer) -> None:
    weight = random_weight(70, columns, 4, 32, False)
    weight.scale[1, -1] = float("inf")
    x, _ = inputs(4, weight, torch.float16)
    x[2, 5] = float("inf")
    packed = operands(weight)
    y, expected = answer(x, packed, None, Config(32, 8, splits=2)), naive.int4_matmul(x, *packed)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[2], touched[:, 1] = True, True
    assert not y[touched].isfinite().any() | expected[touched].isfinite().any()
    assert_close("elsewhere", expected[~touched].float(), y[~touched].float(), ROUNDING[torch.float16])


def test_small_scales_and_activations_are_not_flushed(answer) -> None:
    weight = random_weight(64, 128, 4, 32, True)
    weight.scale.fill_(torch.finfo(torch.float16).smallest_normal / 8)
    x, _ = inputs(3, weight, torch.float16)
    packed = operands(weight)
    assert_close("scales", naive.int4_matmul(x.float(), *packed), answer(x, packed, None, Config(64, 8)).float(), 0.05)
    weight.scale.fill_(256.0)
    x = x * torch.finfo(torch.float16).smallest_normal / 8
    packed = operands(weight)
    expected = naive.int4_matmul(x.float(), *packed)
    assert_close("activations", expected, answer(x, packed, None, Config(64, 8)).float(), 1e-3)


def test_nothing_to_do(answer) -> None:
    weight = random_weight(64, 128, 4, 32, True)
    x, _ = inputs(0, weight, torch.float16)
    assert answer(x, operands(weight), None, Config()).shape == (0, 64)


def test_tables(tmp_path) -> None:
    entries = [(Product(16, 64, 128, 4), Config(splits=2)), (Product(1, 64, 128, 4), Config(dequantize=True))]
    save(entries, tmp_path / "table.json")
    assert read(tmp_path / "table.json") == entries[::-1]


@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 33, 500])
@pytest.mark.parametrize("shape", [(64, 128), (4096, 4096), (128256, 8192)], ids=str)
def test_the_rule_where_nothing_was_measured(tokens: int, shape: tuple[int, int]) -> None:
    for bits, activation_bits in ((2, 16), (3, 16), (4, 16), (8, 16), (2, 8), (4, 8)):
        product = Product(tokens, *shape, bits, activation_bits)
        config = rule(product, processors=132)
        assert config.dequantize == (tokens == 500 and activation_bits == 16)
        assert config.dequantize or config.tokens >= min(tokens, 64)
        assert config.splits * 512 <= max(512, shape[1]) and shared(config, product) <= 99 * 1024


@pytest.mark.parametrize("tokens", [1, 16, 64, 300, 5000])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_what_is_worth_measuring(tokens: int, activation_bits: int) -> None:
    product = Product(tokens, 4096, 4096, 4, activation_bits)
    configs = candidates(product)
    assert len(configs) == len(set(configs)) > 4
    assert Config(dequantize=True) in configs or tokens < 64 or activation_bits == 8
    assert any(config.divided for config in configs) == (tokens <= 64 and activation_bits == 8)
    assert all(shared(config, product) <= 227 * 1024 for config in configs)


def test_a_measured_product_comes_before_its_neighbours(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQ_LIGHTNING_CACHE", str(tmp_path))
    monkeypatch.setattr(table, "architecture", lambda device: "sm00")
    monkeypatch.setattr(table, "_processors", lambda device: 100)
    near, far = Product(16, 4096, 4096, 4), Product(16, 8192, 28672, 4)
    path = table.own_table("sm00")
    for product, config in ((near, Config(splits=2)), (far, Config(splits=3)), (near, Config(splits=4))):
        merge(path, product, config)
    assert read(path) == [(near, Config(splits=4)), (far, Config(splits=3))]
    text = path.read_text().replace('"splits": 4', '"splits": 4, "other": false')
    path.write_text(text.replace('"splits": 3', '"splits": 3, "other": true'))
    assert read(path) == [(near, Config(splits=4))], "of another version: what asks for something unknown is left out"
    path.write_text(
        text.replace('"divided": false', '"divided": true').replace('"divided": true', '"divided": false', 1)
    )
    assert read(path) == [(near, Config(splits=4))], "and what asks for something that is not done here"
    merge(path, far, Config(splits=3))
    device = torch.device("cpu")
    assert choose(near, device) == choose(replace(near, tokens=9, rows=5120), device) == Config(splits=4)
    assert choose(replace(far, tokens=3), device) == Config(splits=3)
    assert choose(replace(near, tokens=1000), device) == Config(splits=4)  # more than any that was measured
    other = replace(near, bits=3)
    assert choose(other, device) == rule(other, 100)
    choose.cache_clear()


@pytest.mark.skipif(DEVICE == "cpu", reason="a GPU names its architecture")
def test_a_configuration_for_every_product() -> None:
    for tokens in (1, 5, 64, 5000):
        assert choose(Product(tokens, 4096, 4096, 4), torch.device("cuda", 0)).tokens >= 1


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs")
def test_a_graph_replays_the_product() -> None:
    from aq_lightning.kernels.int4_matmul import int4_matmul

    weight = random_weight(256, 1024, 4, 128, False)
    x, bias = inputs(3, weight, torch.float16)
    packed = operands(weight)
    expected = int4_matmul(x, *packed, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = int4_matmul(x, *packed, bias)
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability() < (9, 0), reason="programmatic dependent launch, since Hopper"
)
@pytest.mark.parametrize("config", [Config(16, 8, splits=4), Config(64, 8), Config(128, 8, splits=4)], ids=str)
def test_starting_early_waits_for_what_it_reads(config: Config) -> None:
    from aq_lightning.kernels.int4_matmul import triton

    weights = [operands(random_weight(1024, 1024, 4, 128, False)) for _ in range(4)]
    x = torch.randn(3, 1024, device=DEVICE).half()

    def chain(config: Config) -> Tensor:
        y = x
        for weight in weights * 8:
            y = triton.int4_matmul(torch.nn.functional.rms_norm(y, (1024,)), weight, None, config)
        return y

    expected = chain(config)
    chain(replace(config, overlap=True))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(replace(config, overlap=True))
        y = chain(replace(config, overlap=True)) + 0 * y
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability() < (9, 0), reason="programmatic dependent launch, since Hopper"
)
def test_products_that_start_early_one_behind_the_other() -> None:
    from aq_lightning.kernels.int4_matmul import triton

    weight = random_weight(1024, 1024, 4, 128, True)
    weight.scale.mul_(0.25)  # the chain neither grows nor fades
    packed = operands(weight)
    x = torch.randn(3, 1024, device=DEVICE).half()

    def chain(config: Config) -> Tensor:
        y = x
        for _ in range(12):
            y = triton.int4_matmul(y, packed, None, config)
        return y

    config = Config(32, 8, splits=2, warps=2)
    expected = chain(config)
    assert expected.isfinite().all() and expected.abs().max() > 0
    for _ in range(20):
        assert torch.equal(chain(replace(config, overlap=True)), expected)
