"""The rows of the final table are measured on the models that they name, and measuring changes nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from aq_lightning.comparison import Comparison
from aq_lightning.models.loading import load
from aq_lightning.scheme import Scheme

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")
QUIET = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}


@pytest.fixture
def comparison() -> Comparison:
    windows = torch.randint(0, 96, (4, 24))
    return Comparison(DataLoader(windows), partial(Trainer, accelerator="cpu", devices=1, **QUIET))


@pytest.mark.parametrize("scheme", ["w3a16g32", "w4a4"])
def test_baselines_leave_the_model_as_it_was(comparison: Comparison, model_directory: Path, scheme: str) -> None:
    """Rotary tables too: they are float32 whatever the weights are, and calibration goes on with them."""
    pretrained = load(str(model_directory))
    tensors = dict(pretrained.model.named_parameters()) | dict(pretrained.model.named_buffers())
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    full, nearest = comparison.baselines(pretrained, Scheme.parse(scheme))
    after = dict(pretrained.model.named_parameters()) | dict(pretrained.model.named_buffers())
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    assert full.perplexity != nearest.perplexity and full.bits == 16 > nearest.bits
    again, _ = comparison.baselines(pretrained, Scheme.parse(scheme))
    assert again == full
    assert comparison.checkpoint(str(model_directory), "same").perplexity == full.perplexity


def test_references_leave_the_model_as_it_was(comparison: Comparison, model_directory: Path) -> None:
    pretrained = load(str(model_directory))
    before = {name: tensor.clone() for name, tensor in pretrained.model.named_parameters()}
    nf4, int8 = comparison.references(pretrained, ["nf4", "int8"])
    full, nearest = comparison.baselines(pretrained, Scheme.parse("w2a16"))
    assert [nf4.model, int8.model] == ["bitsandbytes nf4", "bitsandbytes int8"] and 4.5 == nf4.bits < 8 < int8.bits
    assert 0 < abs(int8.perplexity - full.perplexity) < abs(nf4.perplexity - full.perplexity)
    for name, tensor in pretrained.model.named_parameters():
        assert torch.equal(tensor, before[name]), name
