"""Tuning of scales and norms: the right gradient, the right divergence in every architecture, no code moved unasked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fitting import CPU, LIGHTNING
from helpers import assert_close
from lightning.pytorch import Trainer
from recorder import Recorder
from tiny import MODELS, tiny
from torch import Tensor
from transformers import PreTrainedModel

from aq_lightning.calibration import (
    WHOLE,
    Inside,
    LiveWindow,
    Pairs,
    Stopping,
    assemble,
    capture,
    captured,
    retuned,
    tune,
)
from aq_lightning.calibration.streams import run
from aq_lightning.calibration.tuned import TunedWeight
from aq_lightning.calibration.tuning import Tuned, WholeModel
from aq_lightning.calibration.window import Weights
from aq_lightning.errors import RequestError
from aq_lightning.export.loading import model_of
from aq_lightning.models.loading import Pretrained, Source
from aq_lightning.objectives import BlockMSE
from aq_lightning.qtensor import QTensor, encode, grid_of
from aq_lightning.quantizers import MinMax
from aq_lightning.recipe import LearningRates, Recipe, ScaleTuning, StreamStorage, WindowPlan
from aq_lightning.rounders import Nearest
from aq_lightning.scheme import Grid, Scheme

pytestmark = LIGHTNING
QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
TUNING = ScaleTuning(epochs=3, scales=2e-2, norms=2e-2)
TOKENS = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(0))


class Case:
    """A random model rounded to nearest, and everything that tuning it takes."""

    def __init__(self, name: str = "llama", tuning: ScaleTuning = TUNING) -> None:
        made = tiny(name, torch.float32)
        made.model.config.dtype = torch.float16
        self.recipe = Recipe(
            Scheme.parse("w2a16g16" if name != "gemma2" else "w3a16"), {}, MinMax, Nearest(), BlockMSE(),
            torch.optim.AdamW, LearningRates(0, 0), "none", 4, WindowPlan(2), StreamStorage("float32", "host"), False,
            False, "padded", tuning=tuning,
        )  # fmt: skip
        self.model = Pretrained(Source("random"), made.model, None, made.architecture)
        self.stream, self.arguments = capture(self.model.shell(), TOKENS, self.recipe.streams, CPU)
        live = LiveWindow(self.model, self.model.window(range(2)), self.arguments, self.recipe, CPU)
        self.target = live.run(self.stream)
        self.weights: Weights = live.merge(live.attach_nearest(self.stream), [{}, {}])

    def whole(self, device: torch.device = CPU) -> WholeModel:
        return assemble(self.model, self.recipe, self.arguments, lambda _: self.weights, device)

    def tune(self, place: Path, device: torch.device = CPU) -> Tuned:
        plan = {"accelerator": device.type, "devices": 1, "max_epochs": self.recipe.tuning.epochs}
        plan |= {"default_root_dir": str(place)}
        inside = Inside(place / "inside", 0, Stopping(), lambda _: None)
        trainer, data = inside.attempts(WHOLE, lambda: Trainer(**plan, **QUIET)), (self.stream, self.target)
        size = self.recipe.tuning.batch_size
        return tune(self.whole(device), self.model, data, trainer, lambda: Pairs(*data, size, 0))

    def divergence(self, weights: Weights) -> float:
        """From the model itself, by transformers' own forward pass of both."""
        dense = {name: value.dequantize(torch.float32) if isinstance(value, QTensor) else value.float()
                 for name, value in {**self.model.outside(), **weights}.items()}  # fmt: skip
        written = model_of(self.model.model.config, dense, torch.float32)
        p, q = (probabilities(each) for each in (self.model.model, written))
        return float((p * (p / q).log()).sum(-1).mean())


def probabilities(model: PreTrainedModel) -> Tensor:
    return model(TOKENS, use_cache=False).logits.double().softmax(-1)


def test_weights_and_their_gradient_are_those_of_plain_autograd() -> None:
    weight, grid = torch.randn(8, 48), Grid(3, 16)
    groups = weight.unflatten(1, (-1, 16))
    scale, zero = grid_of(groups.amin(-1), groups.amax(-1), grid, torch.float16)
    codes = encode(groups, scale[..., None], zero[..., None], grid).flatten(1)
    tensor = QTensor(codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), grid)
    module, cotangent = TunedWeight(tensor), torch.randn(8, 48)
    assert torch.equal(module(), tensor.dequantize(torch.float32))
    (got,) = torch.autograd.grad((module() * cotangent).sum(), module.ratio)
    assert_close("d ratio", (tensor.dequantize(torch.float32) * cotangent).unflatten(1, (3, -1)).sum(-1), got, 1e-5)


def test_codes_go_where_their_offsets_take_them() -> None:
    """Up to the ends of the grid, from where they may return; the gradient of an offset is the weight's in steps."""
    codes = torch.tensor([[0, 3, 5, 7]], dtype=torch.uint8)
    tensor = QTensor(codes, torch.tensor([[0.5]]).half(), torch.tensor([[3]], dtype=torch.uint8), Grid(3, None))
    module = TunedWeight(tensor, torch.Generator())
    assert -0.5 < module.offset.min() < module.offset.max() < 0.5
    assert torch.equal(module(), tensor.dequantize(torch.float32)) and torch.equal(module.tensor().codes, codes)
    with torch.no_grad():
        module.offset.copy_(torch.tensor([[-0.7, 0.4, 1.6, 1.1]]))
    module.project()
    assert module.offset.tolist() == [pytest.approx([-0.4995, 0.4, 1.6, 0.4995])]
    assert module.tensor().codes.tolist() == [[0, 3, 7, 7]] and module.tensor().codes.dtype == torch.uint8
    assert module().tolist() == [[-1.5, 0.0, 2.0, 2.0]]
    cotangent = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    offset, ratio = torch.autograd.grad((module() * cotangent).sum(), (module.offset, module.ratio))
    assert offset.tolist() == [[0.5, 1.0, 1.5, 2.0]] and float(ratio) == pytest.approx(-1.5 + 6 + 8)


@pytest.mark.parametrize("name", MODELS)
def test_the_divergence_is_that_of_the_models(name: str, tmp_path: Path) -> None:
    """Before and after, of what is written; and no code or zero point is another."""
    case = Case(name)
    result = case.tune(tmp_path)
    assert result.before == pytest.approx(case.divergence(case.weights), rel=1e-3)
    assert result.after < 0.9 * result.before
    tuned = retuned(case.weights, result.tensors)
    assert result.after == pytest.approx(case.divergence(tuned), rel=1e-3)
    assert tuned.keys() == case.weights.keys()
    for key, before in case.weights.items():
        after = tuned[key]
        if isinstance(before, QTensor):
            assert torch.equal(after.codes, before.codes) and torch.equal(after.zero, before.zero)
            assert after.scale.dtype == before.scale.dtype and after.scale.shape == before.scale.shape
            assert not torch.equal(after.scale, before.scale) or not before.codes.ne(before.zero[:, :1]).any(), key
        else:
            assert after.dtype == before.dtype and (before.ndim == 1 or torch.equal(after, before))


@pytest.mark.parametrize("name", ["llama", "opt", "qwen2", "mixtral"])
def test_codes_alone_bring_it_nearer(name: str, tmp_path: Path) -> None:
    """Of those which have a reason 16 % may move, on 32 steps whose size falls to 0."""
    case = Case(name, ScaleTuning(16, 0.0, 0.0, codes=1e-2 / 3))  # of 3 steps
    result = case.tune(tmp_path)
    assert result.after < 0.8 * result.before
    tuned = retuned(case.weights, result.tensors)
    assert result.after == pytest.approx(case.divergence(tuned), rel=1e-3)
    coded = [name for name, before in case.weights.items() if isinstance(before, QTensor)]
    flipped = torch.stack([(tuned[name].codes != case.weights[name].codes).float().mean() for name in coded])
    assert 0 < flipped.mean() < 0.16
    for name in coded:
        before, after = case.weights[name], tuned[name]
        assert torch.equal(after.zero, before.zero) and torch.equal(after.scale, before.scale)
        assert after.codes.max() < before.grid.levels
    offsets = [weight.offset for weight in case.whole().weights()]
    assert all(offsets[0].shape != each.shape or not torch.equal(offsets[0], each) for each in offsets[1:])


@pytest.mark.parametrize("codes", [0.0, 1e-2])
def test_recorded_steps_are_the_plain_ones(codes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 epochs of 2 steps each, and a third of another size, not replayed; nothing follows where codes stay."""
    monkeypatch.setattr(captured, "Graph", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    plain = Case(tuning=ScaleTuning(3, 1e-2, 1e-2, codes, batch_size=3))
    recorded = Case(tuning=plain.recipe.tuning)
    recorded.recipe = replace(recorded.recipe, captured=True)
    expected, found = plain.tune(tmp_path / "plain"), recorded.tune(tmp_path / "recorded")
    assert [each.replays for each in Recorder.made] == ([6, 6] if codes else [6])
    assert found.after == pytest.approx(expected.after, rel=1e-5) and found.after < found.before
    assert found.tensors.keys() == expected.tensors.keys()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("codes", [0.0, 1e-2])
@pytest.mark.parametrize("name", ["llama", "opt", "qwen2"])
def test_graphs_on_a_gpu_do_what_plain_steps_do(name: str, codes: float, tmp_path: Path) -> None:
    results = []
    for choice in (False, True):
        case = Case(name, ScaleTuning(3, 1e-2, 1e-2, codes, batch_size=4))
        case.recipe = replace(case.recipe, captured=choice)
        results.append(case.tune(tmp_path / str(choice), torch.device("cuda")))
    plain, recorded = results
    assert recorded.before == pytest.approx(plain.before, rel=1e-5)
    assert recorded.after == pytest.approx(plain.after, rel=1e-3) and recorded.after < recorded.before


def test_memory_does_not_hold_every_blocks_weights() -> None:
    """Between the passes nothing that a block computed stays but what enters it."""
    case = Case()
    whole, sizes = case.whole(), []

    def kept(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        whole.train().objective(case.stream, case.target)
    assert 0 < max(sizes) <= case.stream.numel()


def test_what_does_not_help_is_left_as_it_was(tmp_path: Path) -> None:
    for tuning in (ScaleTuning(1, 0.0, 0.0), ScaleTuning(1, 1e3, 0.0), ScaleTuning(1, 1e6, 1e6)):
        case = Case(tuning=tuning)
        result = case.tune(tmp_path / str(tuning.scales))
        assert result.tensors == {} and not result.after < result.before
        assert retuned(case.weights, result.tensors) == case.weights


@pytest.mark.parametrize(
    "changes", [{"epochs": 0}, {"batch_size": 0}, {"scales": -1.0}, {"norms": float("nan")}, {"codes": -1.0}], ids=str
)
def test_what_cannot_be_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=f"got tuning.{next(iter(changes))} "):
        ScaleTuning(**{"epochs": 1, "scales": 1e-2, "norms": 1e-2, **changes})


def test_the_full_precision_model_is_no_distance_from_itself() -> None:
    case = Case()
    whole = case.whole()
    assert whole.divergence(case.target[0], case.target[0]).abs() < 1e-6
    answered = run(whole.blocks, case.arguments, case.stream, 4, CPU)
    assert whole.divergence(answered[0], case.target[0]) > 1e-3
