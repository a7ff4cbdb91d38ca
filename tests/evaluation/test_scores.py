"""The numbers of the final table."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import tiny_llama
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from aq_lightning.comparison import nearest_bits
from aq_lightning.evaluation import PerplexityTest, Row, effective_bits, render
from aq_lightning.quantizers import MinMax
from aq_lightning.scheme import Grid

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


def test_table_is_aligned() -> None:
    rows = [Row("full precision", 5.678, 16.0), Row("x", 123456.7, 3.28125), Row("rtn", 99.996, 4.5)]
    lines = render(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert [line.split()[-2:] for line in lines[1:]] == [["5.68", "16.000"], ["1.23e+05", "3.281"], ["100.00", "4.500"]]
    assert lines[2].startswith("x ")
