"""Means, their errors, and how models are put side by side."""

from __future__ import annotations

import json
import math

import pytest
import torch

from aq_lightning.evaluation import Sample, Score, Scored, agreements, differences, divergences, render_scores

VALUES = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)


def test_error_of_a_mean_by_hand() -> None:
    """s² = (4 + 1 + 1 + 4) / 3, error s / 2; of an exponential e³ times that."""
    mean, power = Score(VALUES), Score(VALUES, exponential=True)
    error = math.sqrt(10 / 3) / 2
    assert (mean.value, mean.error) == (3.0, pytest.approx(error))
    assert (power.value, power.error) == (pytest.approx(math.exp(3)), pytest.approx(math.exp(3) * error))
    assert mean.as_dict() == {"value": 3.0, "error": mean.error, "units": 4}


def test_the_error_of_a_difference_is_that_of_pairs() -> None:
    """What is hard for both cancels: a constant distance has no error, though both means have large ones."""
    difference, error = Score(VALUES + 0.25).beyond(Score(VALUES))
    assert difference == 0.25 and error == pytest.approx(0, abs=1e-12)
    swapped = Score(VALUES.flip(0))
    assert Score(VALUES).beyond(swapped) == (0, pytest.approx(float((VALUES - VALUES.flip(0)).std()) / 2))


def test_the_error_of_a_perplexity_is_that_of_repeated_draws() -> None:
    """The delta method against 4,000 draws of 64 windows, alone and in pairs."""
    torch.manual_seed(0)
    hard = 3 + 0.3 * torch.randn(4000, 64, dtype=torch.float64)
    other = hard + 0.1 + 0.05 * torch.randn_like(hard)
    drawn = other.mean(1).exp() - hard.mean(1).exp()
    first, second = Score(hard[0], exponential=True), Score(other[0], exponential=True)
    assert first.error == pytest.approx(float(hard.mean(1).exp().std()), rel=0.25)
    assert second.beyond(first)[1] == pytest.approx(float(drawn.std()), rel=0.25)
    assert second.beyond(first)[1] < 0.4 * first.error


def test_other_units_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="same units"):
        Score(VALUES).beyond(Score(VALUES[:3]))


def test_one_unit_has_no_error_and_json_no_nan() -> None:
    assert math.isnan(Score(VALUES[:1]).error)
    assert json.dumps(Score(VALUES[:1]).as_dict(), allow_nan=False) == '{"value": 1.0, "error": null, "units": 1}'
    assert Score(torch.tensor([1e4, 1e4]).double(), exponential=True).as_dict()["value"] is None


def test_samples_gather_what_comes_in_parts() -> None:
    sample = Sample()
    sample.update(torch.tensor([1.0, 2.0]))
    sample.update(torch.tensor(6.0))
    assert sample.compute() == 3 and sample.values().tolist() == [1, 2, 6]
    sample.reset()
    assert len(sample.values()) == 0


def test_divergence_and_agreement_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]), torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
    expected = (p * (p / q).log()).sum(-1)
    shifted = q.log() + torch.tensor([[3.0], [-2.0]])  # logits are probabilities up to a constant
    assert torch.allclose(divergences(p.log(), shifted), expected, atol=1e-6)
    assert agreements(p.log(), shifted).tolist() == [0, 1]
    assert torch.allclose(divergences(p.log(), p.log() + 7), torch.zeros(2), atol=1e-6)


def model(name: str, add: float, **others: Score) -> Scored:
    return Scored(name, 16.0 if not add else 3.297, 0.0, "transformers", {"text": Score(VALUES + add, True), **others})


def test_models_side_by_side() -> None:
    accuracy = Score(torch.tensor([1.0, 0, 1, 0]).double())
    table = [model("full", 0), model("a much longer name", 0.1, acc=accuracy)]
    lines = render_scores(table).splitlines()
    assert lines[0].split() == ["model", "bits/weight", "text", "acc"]
    assert lines[1].split() == ["full", "16.000", "20.09", "±", "18.34"]
    assert lines[2].split()[-7:] == ["3.297", "22.20", "±", "20.26", "0.5000", "±", "0.2887"]
    assert lines[4].split() == ["less", "full", "text", "acc"] and lines[5].split()[-3:] == ["+2.11", "±", "1.93"]
    (found,) = differences(table)
    assert (found["model"], found["beyond"]) == ("a much longer name", "full") and set(found["scores"]) == {"text"}
    alone = render_scores(table[:1]).splitlines()
    assert len(alone) == 3 and alone[-1] == "(± standard error)"


def test_unknown_bits_and_an_overhead_are_shown() -> None:
    scored = Scored("m", math.nan, 16.67, "transformers", {"text": Score(VALUES + 10, exponential=True)})
    head, row, _ = render_scores([scored]).splitlines()
    assert head.split() == ["model", "bits/weight", "multiply–adds", "text"]
    assert row.split() == ["m", "?", "+16.67", "%", "4.42e+05", "±", "4.04e+05"]
    assert scored.as_dict()["bits"] is None and scored.as_dict()["perplexity"] == pytest.approx(math.exp(13))
