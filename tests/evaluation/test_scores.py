"""The numbers of the final table."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from helpers import tiny_llama
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from aq_lightning.calibration import attach, merge
from aq_lightning.comparison import nearest_bits
from aq_lightning.evaluation import PerplexityTest, Row, effective_bits, overhead, overhead_lines, render
from aq_lightning.models.llama import SPEC
from aq_lightning.models.sites import Heads
from aq_lightning.quantizers import MinMax
from aq_lightning.scheme import Grid, Scheme
from aq_lightning.transforms import Affine, Diagonal

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")


def perplexity(windows: Tensor, batch_size: int) -> float:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
                      enable_model_summary=False)  # fmt: skip
    (scores,) = trainer.test(PerplexityTest(tiny_llama()), DataLoader(windows, batch_size), verbose=False)
    assert scores["perplexity"] == pytest.approx(torch.tensor(scores["loss"]).double().exp().item(), rel=1e-6)
    return scores["perplexity"]


@torch.no_grad()
def test_perplexity_by_hand() -> None:
    """exp of minus the mean log-probability of each next token within its window."""
    windows, model = torch.randint(0, 96, (5, 24)), tiny_llama()
    logs = []
    for window in windows:
        probabilities = model(window[None]).logits[0].double().softmax(-1)
        logs += [probabilities[place, window[place + 1]].log() for place in range(23)]
    assert len(logs) == 5 * 23
    expected = torch.exp(-torch.stack(logs).mean()).item()
    assert perplexity(windows, 1) == pytest.approx(expected, rel=1e-5)
    assert perplexity(windows, 2) == pytest.approx(expected, rel=1e-5), "the last batch is smaller"
    assert perplexity(windows, 5) == pytest.approx(expected, rel=1e-5)
    assert perplexity(windows.flip(1), 1) != pytest.approx(expected, rel=1e-3), "the order of tokens matters"


def test_effective_bits_by_hand() -> None:
    """4 rows of 32 codes of 3 bits; groups of 8 with a float16 scale and a 3-bit zero point; a bias of 4 float32."""
    packed = MinMax(Grid(3, 8), (4, 32), torch.float16).quantize(torch.randn(4, 32))
    codes, groups, bias = 4 * 32 * 3, 4 * 4 * (16 + 3), 4 * 32
    assert effective_bits({"a.weight": packed}) == (codes + groups) / 128
    assert effective_bits({"a.weight": packed, "a.bias": torch.zeros(4), "norm.weight": torch.ones(9)}) == (
        (codes + groups + bias) / 128
    )
    symmetric = MinMax(Grid(3, 8, True), (4, 32), torch.float16).quantize(torch.randn(4, 32))
    assert effective_bits({"a.weight": symmetric}) == (codes + 4 * 4 * 16) / 128
    assert math.isnan(effective_bits({"norm.weight": torch.ones(9)})), "nothing was quantized"


@pytest.mark.parametrize("name, expected", [("a", 4 + 20 / 64), ("b", 4 + 16 / 64)])
def test_nearest_bits_of_a_model(name: str, expected: float) -> None:
    """Per group of 64 channels, which is a whole row but for down_proj's two groups."""
    blocks = tiny_llama().model.layers
    assert nearest_bits(blocks, Grid(4, 64, symmetric=name == "b"), torch.float16) == expected


DENSE = partial(Affine, online=True)
ONLINE = {
    "attention_input": [Diagonal, DENSE],
    "value_output": [DENSE],
    "mlp_hidden": [Diagonal, partial(DENSE, block=32)],
}
OWN = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
"""Weights of a block's linears, and so their multiply–adds per token: q, k, v, o of 4 heads on 2, and an MLP of 128."""
COSTS = {  # numbers, multiply–adds per token
    "attention_input": (64 * 64, 64 * 64),
    "value_output": (2 * 16 * 16, 64 * 16),  # a matrix per key-value head, used by each of its 2 query heads
    "mlp_hidden": (128 * 32, 128 * 32),
}


def attached_online(block: torch.nn.Module):
    return attach(block, SPEC, Heads(4, 2, 16, 16), ONLINE, MinMax, Scheme.parse("w4a16"), torch.float16)


def test_overhead_by_hand() -> None:
    """The same on a plan without weights and on the merged model."""
    numbers, multiply_adds = map(sum, zip(*COSTS.values(), strict=True))
    plan = tiny_llama().model.layers[0].to("meta")
    attached_online(plan)
    model = tiny_llama()
    block = model.model.layers[0]
    merged = merge(attached_online(block), torch.float16)
    for place in (plan, block):
        cost = overhead(place)
        assert (cost.numbers, cost.multiply_adds, cost.weights) == (numbers, multiply_adds, OWN)
        assert cost.percent == 100 * multiply_adds / OWN and cost.bits(16) == numbers * 16 / OWN
    assert overhead(model.model.layers).percent == 50 * multiply_adds / OWN, "the other block carries nothing"
    without = {name: tensor for name, tensor in merged.items() if ".online." not in name}
    assert effective_bits(merged) - effective_bits(without) == pytest.approx(numbers * 16 / OWN, rel=1e-12)


def test_overhead_is_told_site_by_site() -> None:
    plan = tiny_llama().model.layers[0].to("meta")
    attached = attached_online(plan)
    *sites, total = overhead_lines(plan, attached.carriers, 5, 16)
    assert len(sites) == len(COSTS)
    for line, (site, (numbers, multiply_adds)) in zip(sites, COSTS.items(), strict=True):
        assert line.startswith(f"online: {site} (")
        assert f"{multiply_adds:,} multiply–adds per token (+{100 * multiply_adds / OWN:.2f} %)" in line
        assert f"{16 * numbers / OWN:.3f} bits per weight ({numbers:,} numbers) in each of 5 blocks" in line
    numbers, multiply_adds = (5 * sum(column) for column in zip(*COSTS.values(), strict=True))
    assert f"{multiply_adds:,} multiply–adds" in total and f"({numbers:,} numbers)" in total
    attached.detach()
    assert overhead_lines(plan, {}, 5, 16) == []


def test_table_shows_an_overhead_where_there_is_one() -> None:
    rows = [Row("full precision", 5.678, 16.0), Row("dense", 7.5, 5.28125, 16.6666)]
    lines = render(rows).splitlines()
    assert lines[0].endswith("multiply–adds") and len({len(line) for line in lines}) == 1
    assert lines[1].endswith(" +0.00 %") and lines[2].endswith(" +16.67 %")
    assert "multiply–adds" not in render(rows[:1])
    assert rows[1].as_dict()["overhead"] == 16.6666


def test_table_is_aligned() -> None:
    rows = [Row("full precision", 5.678, 16.0), Row("x", 123456.7, 3.28125), Row("rtn", 99.996, 4.5)]
    lines = render(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert [line.split()[-2:] for line in lines[1:]] == [["5.68", "16.000"], ["1.23e+05", "3.281"], ["100.00", "4.500"]]
    assert lines[2].startswith("x ")
