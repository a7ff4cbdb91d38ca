"""A rotated model is the same function in another basis, whole and block by block."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from helpers import assert_close, relative_error
from tiny import MODELS, Tiny, called, tiny, tiny_config, true_softmax
from torch import Tensor
from transformers import PreTrainedModel

from aq_lightning.calibration import rotated
from aq_lightning.calibration.call import answer
from aq_lightning.calibration.rotated import value_site
from aq_lightning.errors import RequestError
from aq_lightning.models.lookup import architecture_of
from aq_lightning.models.pretrained import Pretrained, Source
from aq_lightning.transforms import LearnedRotation, Rotation

ROTATED = [name for name in MODELS if architecture_of(tiny_config(name)).final_norm]
IDS = torch.arange(2 * 12).reshape(2, 12) * 7 % 90 + 3


@pytest.fixture(autouse=True)
def float64_softmax():
    with true_softmax():
        yield


def pretrained(small: Tiny) -> Pretrained:
    small.model.config.dtype = torch.float64
    return Pretrained(Source("random"), small.model, None, small.architecture)


def assembled(model: Pretrained) -> PreTrainedModel:
    """The whole model, from what the engine reads of it."""
    whole, shell = deepcopy(model.model), model.shell()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        getattr(whole, getter)().weight = getattr(shell, getter)().weight
    norm = model.architecture.final_norm
    whole.get_submodule(norm).weight = shell.get_submodule(norm).weight
    blocks = whole.get_submodule(model.architecture.blocks)
    for index in range(len(blocks)):
        blocks[index] = model.block(index)
    return whole


def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ROTATED)
def test_logits_are_unchanged(name: str, tied: bool, kind: str) -> None:
    small = tiny(name, tie_word_embeddings=tied)
    expected = logits(small.model)
    model = rotated(pretrained(small), Rotation(kind))
    whole = assembled(model)
    assert_close("logits", expected, logits(whole), 1e-10)
    assert model.config()["tie_word_embeddings"] is False
    head = whole.get_output_embeddings().weight
    assert {name for name, tensor in model.outside().items() if torch.equal(tensor, head)} == {"lm_head.weight"}
    for parameter in whole.parameters():
        assert parameter.dtype == torch.float64


def learned(small: Tiny) -> LearnedRotation:
    width, size = small.model.config.hidden_size, small.heads.size
    shape = (len(small.blocks), size, size)
    return LearnedRotation(*(torch.linalg.qr(torch.randn(*each).double())[0] for each in ((width, width), shape)))


@torch.no_grad()
@pytest.mark.parametrize("name", ROTATED)
def test_logits_are_unchanged_by_what_was_learnt(name: str) -> None:
    """Values are rotated too, in every block another way; and on one side alone that is another model."""
    small = tiny(name)
    expected, rotation = logits(small.model), learned(small)
    model = rotated(pretrained(small), rotation)
    assert_close("logits", expected, logits(assembled(model)), 1e-10)
    without = rotated(pretrained(small), LearnedRotation(rotation.stream, rotation.values[:0]))
    assert_close("stream alone", expected, logits(assembled(without)), 1e-10)
    output = value_site(small.architecture).consumers[0]
    changed, plain = (each.block(1).get_submodule(output).weight for each in (model, without))
    assert relative_error(plain, changed) > 0.1
    whole = assembled(model)
    whole.get_submodule(small.architecture.blocks)[1].get_submodule(output).weight = plain
    assert relative_error(expected, logits(whole)) > 0.1, "negative control"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("name", ROTATED)
def test_a_block_answers_in_the_new_basis(name: str, kind: str) -> None:
    """h Q → f(h) Q, with gains of one; and it is another basis."""
    small = tiny(name)
    call, rotation = called(small), Rotation(kind, seed=3)
    model = rotated(pretrained(small), rotation)
    found = answer(model.block(0), rotation(call.hidden), call.others)
    assert_close("f(h) Q", rotation(call.answer), found, 1e-10)
    assert relative_error(call.answer, found) > 0.1
    for site in (site for site in small.architecture.sites if site.name in ("attention_input", "mlp_input")):
        assert (model.block(0).get_submodule(site.producer).weight + small.architecture.gain_offset == 1).all()
    assert relative_error(call.answer, answer(small.blocks[0], rotation(call.hidden), call.others)) > 0.1


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_a_rotation_is_orthogonal_and_known_by_its_seed(kind: str) -> None:
    unit = torch.eye(48, dtype=torch.float64)
    matrix = Rotation(kind)(unit)
    assert_close("Q Qᵀ", unit, matrix @ matrix.mT, 1e-13)
    assert torch.equal(matrix, Rotation(kind)(unit)) and not torch.equal(matrix, Rotation(kind, 1)(unit))
    assert kind == "random" or torch.allclose(matrix.abs(), torch.full_like(matrix, 48**-0.5))


def test_without_a_rotation_the_model_stays() -> None:
    model = pretrained(tiny("llama"))
    assert rotated(model, None) is model


@pytest.mark.parametrize("name", ["opt", "gemma2", "falcon-7b", "bloom", "gpt_neox"])
def test_streams_that_cannot_be_rotated(name: str) -> None:
    """LayerNorm subtracts a mean, and a norm behind attention writes to the stream."""
    with pytest.raises(RequestError, match="leave out model.rotation"):
        Rotation().check(architecture_of(tiny_config(name)), 64)


def test_widths_without_a_hadamard_matrix() -> None:
    architecture = architecture_of(tiny_config("llama"))
    with pytest.raises(RequestError, match="orders multiply to 66: start at random"):
        Rotation().check(architecture, 66)
    Rotation("random").check(architecture, 66)
