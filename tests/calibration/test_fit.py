"""A window ends no worse than any alternative, whatever happens in training, and says what stopped it."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from fitting import CPU, LIGHTNING, Sabotage, fitted
from helpers import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import Strategy
from torch import nn

from aq_lightning.calibration import BlockCalibration, Cause, LiveWindow
from aq_lightning.calibration.attach import AttachedBlock
from aq_lightning.calibration.watch import Quantity, Watch
from aq_lightning.errors import RequestError
from aq_lightning.optimizers import SignSGD
from aq_lightning.quantizers import GridSearch, LearnedRounding
from aq_lightning.recipe import LearningRates
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import Affine, Diagonal, RopePair, Shift
from callbacks import ConditionNumber

pytestmark = LIGHTNING


def test_an_undisturbed_window_is_trained_once() -> None:
    result = fitted()
    assert (result.outcome, result.attempts, result.causes) == ("trained", 1, ())
    assert set(result.losses) == {"trained", "first epoch", "start", "nearest"}


class Held(Callback):
    """What the optimizer holds when training ends."""

    def on_train_end(self, trainer: Trainer, module: BlockCalibration) -> None:
        self.states = [len(optimizer.state) for optimizer in trainer.optimizers]


def test_nothing_moves_to_the_host_behind_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    teardown, watching, left = Strategy.teardown, Held(), []

    def watched(strategy: Strategy) -> None:
        left.extend(len(optimizer.state) for optimizer in strategy.optimizers)
        teardown(strategy)

    monkeypatch.setattr(Strategy, "teardown", watched)  # which moves them
    module = fitted([watching], epochs=1).module
    assert min(watching.states) > 0 and left == [0] * len(watching.states)
    assert module.to("meta").cpu() is module and {each.device.type for each in module.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "name, value", [("value_output.factors.0.log_scale", math.nan), ("mlp_input.factors.0.delta", math.inf)]
)
def test_what_is_not_finite_is_rolled_back_and_tried_again(name: str, value: float) -> None:
    """With smaller steps and a stronger mask; the last sound epoch of the first attempt competes too."""
    sabotage = Sabotage(name, value, epoch=2)
    result = fitted([sabotage])
    assert result.attempts == 2 and result.causes == (Cause(0, "", "loss", None, 2),)
    assert [module.slowdown for module in sabotage.begun] == [1.0, 0.1]
    assert [module.matrices()[0].stability for module in sabotage.begun] == pytest.approx([0.1, 0.01])
    assert set(result.losses) == {"trained", "rolled back", "first epoch", "start", "nearest"}
    assert all(bool(tensor.isfinite().all()) for tensor in result.module.own().values())
    assert str(result.causes[0]) == "block 0: loss not finite in epoch 2"


def test_a_window_that_always_diverges_falls_back() -> None:
    result = fitted([Sabotage("log_scale", math.nan, epoch=0, attempts=9)])
    assert result.attempts == len(result.causes) == 3 and result.outcome in ("start", "nearest")
    assert set(result.losses) == {"start", "nearest"}
    assert all(bool(tensor.isfinite().all()) for tensor in result.module.own().values())


@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_blocks_are_attached_anew_only_behind_what_was_stopped(stopped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ranges are searched that takes as long as training does."""
    attach, starts = LiveWindow.attach, []

    def counted(self: LiveWindow, *given: object) -> list[AttachedBlock]:
        starts.append(attach(self, *given))
        return starts[-1]

    monkeypatch.setattr(LiveWindow, "attach", counted)
    result = fitted([Sabotage("log_scale", math.nan, epoch=0, attempts=stopped)])
    assert len(starts) == 1 + stopped and result.attempts == 1 + stopped


def test_a_start_is_returned_to_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the first attempt trained the same blocks."""
    attach, states = LiveWindow.attach, []

    def remembered(self: LiveWindow, *given: object) -> list[AttachedBlock]:
        attached = attach(self, *given)
        states.append({name: tensor.clone() for name, tensor in nn.ModuleList(attached).state_dict().items()})
        return attached

    monkeypatch.setattr(LiveWindow, "attach", remembered)
    searched = partial(LearnedRounding, search=GridSearch(weighting="diagonal"))
    result = fitted([Sabotage("log_scale", math.nan, epoch=0, attempts=9)], weight_quantizer=searched)
    assert result.outcome == "start" and len(states) == 3
    assert all(torch.equal(tensor, states[0][name]) for name, tensor in result.module.own().items())


def test_an_exploding_loss_is_divergence() -> None:
    result = fitted([Sabotage("mlp_input.factors.0.delta", 1e4, epoch=1)])
    (cause,) = result.causes
    assert (cause.block, cause.site, cause.what, cause.epoch) == (0, "", "loss", 1)
    assert math.isfinite(cause.value) and cause.value > 100 * result.losses["start"]
    assert f"block 0: loss {cause.value:.2e} in epoch 1" == str(cause)


@pytest.mark.filterwarnings("ignore:block 0, value_output. condition number")
def test_ill_conditioning_beyond_the_second_threshold_stops() -> None:
    sabotage = Sabotage("value_output.factors.0.log_scale", 8.0, epoch=2)
    result = fitted([sabotage, ConditionNumber(warn_above=100.0, stop_above=1000.0)])
    (cause,) = result.causes
    assert (cause.site, cause.what, cause.epoch) == ("value_output", "condition number", 2) and cause.value > 1000
    assert result.module.conditions()["value_output"] < 1000 and result.attempts == 2


def test_thresholds_come_in_order() -> None:
    with pytest.raises(RequestError, match="got warn_above 10 and stop_above 5"):
        ConditionNumber(10.0, 5.0)


class Watcher(Sabotage):
    """Only remembers what was trained."""

    def __init__(self) -> None:
        super().__init__("none", 0.0, 0, 0)


def test_diagonal_guard_is_one_more_candidate() -> None:
    """Trained with the same steps and diagonal matrices; the other candidates are what they were."""
    watcher = Watcher()
    plain, guarded = fitted(), fitted([watcher], diagonal_guard=True)
    assert guarded.attempts == 1 and "diagonal" not in plain.losses
    assert {name: loss for name, loss in guarded.losses.items() if name != "diagonal"} == plain.losses
    diagonal, trained = watcher.begun
    assert (diagonal.opening, trained.opening) == (0, 1)
    away = ~torch.eye(16, dtype=torch.bool)
    assert not diagonal.matrices()[0].effective()[:, away].any()
    assert bool(trained.matrices()[0].effective()[:, away].all())
    assert guarded.losses["diagonal"] != guarded.losses["first epoch"]


def test_the_diagonal_solution_is_kept_where_matrices_do_harm() -> None:
    class Harm(Watcher):
        def on_train_batch_start(self, trainer: Trainer, module: BlockCalibration, batch, index: int) -> None:
            if module.opening:
                module.matrices()[0].matrix.data[:, 0, -1] += 3.0

    result = fitted([Harm()], affine=partial(Affine, stability=1.0), diagonal_guard=True)
    assert result.outcome == "diagonal" and result.module.opening == 0


def test_nothing_to_guard_without_matrices() -> None:
    result = fitted(transforms={"mlp_input": [Diagonal]}, diagonal_guard=True)
    assert "diagonal" not in result.losses and result.outcome == "trained"


@pytest.mark.parametrize("epochs", [0, 1])
def test_few_epochs(epochs: int) -> None:
    result = fitted(epochs=epochs, affine=partial(Affine, stability=1.0))
    assert "first epoch" not in result.losses and result.attempts == 1
    if epochs == 0:
        assert result.losses["trained"] == result.losses["start"]


def test_watch_names_the_first() -> None:
    """Earlier steps before later ones, and within a step the order in which things are computed."""
    names = [Quantity(0, "", "loss"), Quantity(0, "a", "matrix"), Quantity(1, "b", "delta")]
    watch = Watch(names, CPU)
    assert watch.first() is None
    one, bad = torch.ones(()), torch.tensor(torch.nan)
    watch.update([one, one.double(), one])
    assert watch.first() is None
    watch.update([one, one, -bad])
    watch.update([bad, bad, bad])
    assert watch.first() == names[2]
    watch = Watch(names, CPU)
    watch.update([one, one / 0, bad])
    assert watch.first() == names[1]


@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([(1, 1, 6), (3, 1, 2), (4, 2, 10), (6, 3, 4), (2, 2, 14)]),
    intermediate=st.sampled_from([2, 14, 50]),
    epochs=st.integers(0, 2),
    scheme=st.sampled_from(["w2a16", "w3a16g2", "w4a4", "w2a8sym"]),
    affine=st.builds(
        lambda stability, dominance, method: partial(Affine, stability=stability, dominance=dominance, inverse=method),
        st.sampled_from([1.0, 0.1]), st.sampled_from([0.9, None]), st.sampled_from(["lu", "newton"]),
    ),
    rate=st.sampled_from([0.0, 1e-2, 10.0]),
    damage=st.sampled_from(["none", "zero weights", "constant rows", "dead channels", "dead values"]),
    guard=st.booleans(),
)  # fmt: skip
def test_any_block_ends_finite_and_no_worse(heads, intermediate, epochs, scheme, affine, rate, damage, guard) -> None:
    """Ragged heads and widths, few epochs, wild steps, and weights that divide by zero if they can."""
    query, key_value, size = heads
    model = tiny_llama(
        hidden_size=query * size,
        intermediate_size=intermediate,
        num_attention_heads=query,
        num_key_value_heads=key_value,
        num_hidden_layers=1,
    )
    block = model.model.layers[0]
    with torch.no_grad():
        if damage == "zero weights":
            block.self_attn.o_proj.weight.zero_(), block.mlp.up_proj.weight.zero_()
        elif damage == "constant rows":
            block.self_attn.v_proj.weight.fill_(0.3), block.mlp.gate_proj.weight.fill_(-0.3)
        elif damage == "dead channels":
            block.input_layernorm.weight[::2] = 0
            block.post_attention_layernorm.weight.zero_()
        elif damage == "dead values":
            block.self_attn.v_proj.weight[: size // 2].zero_()
    result = fitted(
        epochs=epochs,
        affine=affine,
        model=model,
        scheme=Scheme.parse(scheme),
        transforms={
            "attention_input": [Shift, Diagonal],
            "query_key": [RopePair],
            "value_output": [Diagonal, affine],
            "mlp_input": [Shift, Diagonal],
            "mlp_hidden": [Diagonal],
        },
        learning_rates=LearningRates(rate, rate),
        diagonal_guard=guard,
    )
    assert all(bool(tensor.isfinite().all()) for tensor in result.module.own().values())
    assert 1 <= result.attempts <= 3 and len(result.causes) in (result.attempts - 1, 3)
    assert {"start", "nearest"} <= set(result.losses) and ("diagonal" in result.losses) <= guard


ROUNDING = {
    "weight_quantizer": LearnedRounding,
    "optimizer": SignSGD,
    "learning_rates": LearningRates(1e-3, 0.05, 0.05),
    "decay": "linear",
}


@pytest.mark.parametrize("transforms", [{}, {"value_output": [Diagonal, Affine]}], ids=["alone", "with transforms"])
def test_learned_rounding_beats_learned_clipping(transforms: dict) -> None:
    clipping = fitted(transforms=transforms, epochs=10)
    rounding = fitted(transforms=transforms, epochs=10, **ROUNDING)
    assert rounding.outcome == "trained" and rounding.losses["trained"] < 0.7 * clipping.losses["trained"]


def test_offsets_have_their_own_step_size_and_stay_out_of_the_file() -> None:
    rates = LearningRates(0.0, 0.0, 0.05)
    result = fitted(epochs=2, keep_best=False, **{**ROUNDING, "learning_rates": rates})
    moved = {name.rpartition(".")[2] for name, tensor in result.module.own().items() if moves(name, tensor)}
    assert result.outcome == "trained" and moved == {"offset"}
    learnt = result.module.trained()
    assert {name.rpartition(".")[2] for name in learnt if ".quantizers." in name} == {"lower", "upper"}


def moves(name: str, tensor: torch.Tensor) -> bool:
    """Whether an entry of a quantizer differs from its start."""
    start = 0.0 if name.endswith("offset") else 1.0
    return ".quantizers." in name and bool((tensor != start).any())


def test_linear_decay_ends_at_zero() -> None:
    class Rates(Callback):
        seen: list[float] = []

        def on_train_batch_start(self, trainer: Trainer, module: BlockCalibration, batch, index: int) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[-1]["lr"])

    fitted([Rates()], epochs=2, **ROUNDING)
    assert Rates.seen == pytest.approx([0.05, 0.0375, 0.025, 0.0125])


def test_the_best_step_is_a_candidate_with_the_parameters_of_its_loss() -> None:
    """Batches of all samples: the least loss of a step is that of its parameters."""

    class Losses(Callback):
        seen: list[float] = []

        def on_train_batch_end(self, trainer: Trainer, module: BlockCalibration, outputs, batch, index: int) -> None:
            self.seen.append(float(outputs["loss"]))
            if trainer.global_step == 6:  # what comes after it is worse
                for name, parameter in module.named_parameters():
                    if name.endswith("upper"):
                        parameter.data.fill_(0.2)

    result = fitted([Losses()], epochs=8, batch_size=8, batch=8, keep_best=True, **ROUNDING)
    least = min(Losses.seen)
    assert Losses.seen.index(least) == 5 and result.outcome == "best step"
    assert result.losses["best step"] == pytest.approx(least, rel=1e-3) and result.losses["trained"] > 1.5 * least
