"""The rows of the final table are measured on the models that they name, and measuring changes nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import word_tokenizer
from lightning.pytorch import Trainer
from tiny import MODELS, tiny
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aq_lightning.calibration import attach, merge
from aq_lightning.comparison import Comparison
from aq_lightning.evaluation import PerplexityTest, Row
from aq_lightning.experts import run_here
from aq_lightning.kernels.products import fast_products
from aq_lightning.models.loading import Source, load, load_model
from aq_lightning.quantizers import MinMax, quantized_activations
from aq_lightning.scheme import Scheme

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")
QUIET = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}


@pytest.fixture
def comparison() -> Comparison:
    windows = torch.randint(0, 96, (4, 24))
    return Comparison(DataLoader(windows), partial(Trainer, accelerator="cpu", devices=1, **QUIET))


def whole(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> float:
    """Perplexity as transformers' own forward pass of all of the model gives it."""
    test = PerplexityTest(model.eval())
    loader = DataLoader(windows, batch_size=batch_size)
    with fast_products(torch.device("cpu")):  # sums in the same order
        Trainer(accelerator="cpu", devices=1, **QUIET).test(test, loader, verbose=False)
    return test.score.value


@pytest.mark.parametrize("scheme", ["w3a16g8", "w4a4sym"])
@pytest.mark.parametrize("name", MODELS)
def test_block_by_block_scores_are_those_of_the_whole_model(name: str, scheme: str, tmp_path: Path) -> None:
    """Both baselines, and the full-precision model as a checkpoint; the last batch is smaller than the others."""
    scheme = Scheme.parse(scheme)
    small = tiny(name, torch.float32)
    small.model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    model = load_model(Source(str(tmp_path)))
    run_here(model.config)
    windows = torch.randint(3, 96, (5, 24))
    comparison = Comparison(DataLoader(windows, batch_size=2), partial(Trainer, accelerator="cpu", devices=1, **QUIET))
    pretrained = load(str(tmp_path))
    assert not pretrained.whole
    full, nearest = comparison.baselines(pretrained, scheme)
    assert full.perplexity == whole(model, windows, 2) == comparison.checkpoint(str(tmp_path), "same").perplexity
    assert all(parameter.is_meta for parameter in pretrained.model.parameters())
    blocks = model.get_submodule(small.architecture.blocks)
    for block in blocks:
        merge(attach(block, small.architecture, small.heads, {}, MinMax, scheme, torch.float32), torch.float32)
    with quantized_activations(blocks, scheme.activation):
        assert nearest.perplexity == whole(model, windows, 2) != full.perplexity
    assert comparison.baselines(pretrained, scheme) == [full, nearest]


def test_an_unknown_architecture_is_scored_whole(comparison: Comparison, tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=16, vocab_size=96, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    row = comparison.checkpoint(str(tmp_path), "unknown")
    model = load_model(Source(str(tmp_path)))
    assert row == Row("unknown", whole(model, torch.cat(list(comparison.loader)), 1), 32)


def test_half_precision_is_scored_in_float32(comparison: Comparison, model_directory: Path) -> None:
    full, nearest = comparison.baselines(load(str(model_directory)), Scheme.parse("w3a16g32"))
    model = load_model(Source(str(model_directory)), torch.float32)
    assert full.perplexity == whole(model, torch.cat(list(comparison.loader)), 1)
    assert full.perplexity != nearest.perplexity and full.bits == 16 > nearest.bits


def test_references_are_scored_block_by_block(comparison: Comparison, model_directory: Path) -> None:
    pretrained = load(str(model_directory))
    nf4, int8 = comparison.references(pretrained, ["nf4", "int8"])
    full, _ = comparison.baselines(pretrained, Scheme.parse("w2a16"))
    assert [nf4.model, int8.model] == ["bitsandbytes nf4", "bitsandbytes int8"] and 4.5 == nf4.bits < 8 < int8.bits
    assert 0 < abs(int8.perplexity - full.perplexity) < abs(nf4.perplexity - full.perplexity)
