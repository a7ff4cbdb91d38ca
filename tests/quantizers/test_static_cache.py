"""Keys and values on grids that calibration has found, the same for all tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import assert_close, relative_error
from tiny import MODELS, called, tiny, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from aq_lightning import deploy
from aq_lightning.attention import Heads
from aq_lightning.calibration import attach, merge
from aq_lightning.calibration.cache import choose_cache
from aq_lightning.calibration.rounding import Passes
from aq_lightning.cli import main
from aq_lightning.errors import RequestError
from aq_lightning.export.compressed_tensors import read
from aq_lightning.export.loading import open_model
from aq_lightning.models.lookup import architecture_of
from aq_lightning.models.sites import SiteShape
from aq_lightning.qtensor import decode, encode, grid_of
from aq_lightning.quantizers import quantize_cache, quantized
from aq_lightning.scheme import Grid, Scheme
from aq_lightning.transforms import Clip, Dense, StaticCache
from aq_lightning.transforms.online import CacheGrid, carried

SEEN = [name for name in MODELS if architecture_of(tiny_config(name)).attention]
IDS = torch.arange(2 * 24).reshape(2, 24) * 7 % 96
CPU = torch.device("cpu")


def test_every_token_has_the_grid_that_comes_with_it() -> None:
    heads = Heads(*(torch.randn(2, count, 5, 16) for count in (4, 2, 2)))
    step, zero = torch.rand(2, 2, 2) + 0.1, torch.randint(0, 16, (2, 2, 2)).float()  # keys and values, heads, runs
    operation = CacheGrid(key_step=step[0], key_zero=zero[0], value_step=step[1], value_zero=zero[1])
    found = quantize_cache(operation(heads), Grid(4, 8))
    assert torch.equal(found.query, heads.query)
    for kind, (x, y) in enumerate(((heads.key, found.key), (heads.value, found.value))):
        for head in range(2):
            for run in range(2):
                piece, grid = x[:, head, :, 8 * run : 8 * run + 8], (step[kind, head, run], zero[kind, head, run])
                expected = decode(encode(piece, *grid, Grid(4)), *grid)
                assert torch.equal(y[:, head, :, 8 * run : 8 * run + 8], expected)


def test_the_stored_grid_is_the_one_trained() -> None:
    factor = StaticCache(SiteShape(2, 16, dual=True), Grid(4, 8), torch.float16)
    reach = torch.stack([-torch.rand(2, 2, 2), torch.rand(2, 2, 2)], 1).double()
    factor.start(reach, torch.full((2, 2, 2), 0.8, dtype=torch.float64))
    (tensors,) = factor(torch.float32).online
    step, zero = grid_of(0.8 * reach[0, 0], 0.8 * reach[0, 1], Grid(4), torch.float16)
    assert torch.equal(tensors["key_step"].double(), step) and torch.equal(tensors["key_zero"].double(), zero)
    assert torch.equal(tensors["value_step"], tensors["value_step"].half().float())
    sum(tensor.sum() for tensor in tensors.values()).backward()
    assert (factor.ends.grad != 0).all()


def keys_and_values(block: nn.Module, hidden: Tensor, others: dict) -> list[Heads]:
    """What the grid of each attention meets."""
    seen: list[Heads] = []
    for _, online in carried(block):
        online[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(hidden, **others)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("run", ["", "x4"])
@pytest.mark.parametrize("name", SEEN)
def test_where_it_starts(name: str, run: str) -> None:
    """On every architecture, behind a matrix on keys: no part of the range that is tried rounds what it saw better."""
    small, scheme = tiny(name, torch.float32), Scheme.parse(f"w4a16kv3static{run}")
    call, block = called(small), small.blocks[0]
    matrices = {"query_key": [partial(Dense, form="free", start="random", shared=True, online=True)]}
    attached = attach(block, small.architecture, small.heads, matrices, None, scheme, torch.float32)
    factor = attached.transforms["query_key"].factors[-1]
    with quantized([block], scheme):
        choose_cache(attached, Passes(call.others, 2, CPU), call.hidden)
    (seen,) = keys_and_values(merged(attached), call.hidden, call.others)
    runs = factor.reach.shape[-1]
    for kind, x in enumerate((seen.key, seen.value)):
        pieces = x.unflatten(-1, (runs, -1)).permute(1, 3, 0, 2, 4).flatten(2)  # (heads, runs, numbers)
        low, high = pieces.amin(-1).clamp(max=0), pieces.amax(-1).clamp(min=0)
        assert_close("range", torch.stack([low, high]), factor.reach[kind], 1e-5)

        def error(part: Tensor | float, pieces=pieces, low=low, high=high) -> Tensor:
            grid = grid_of((low * part)[..., None], (high * part)[..., None], Grid(3), torch.float32)
            return (pieces - decode(encode(pieces, *grid, Grid(3)), *grid)).square().sum(-1)

        chosen = error(factor.ends[kind, 0].exp().float())
        assert all((chosen <= 1.001 * error(part)).all() for part in torch.linspace(1, 0.3, 15).tolist())


def merged(attached) -> nn.Module:
    merge(attached, torch.float32)
    return attached.block


def test_what_looks_at_tokens_is_refused() -> None:
    small = tiny("llama")
    for transforms in ({"query_key": [Clip]},):
        with pytest.raises(RequestError, match="looks at each token, got scheme w4a4kv4static"):
            attach(small.blocks[0], small.architecture, small.heads, transforms, None, Scheme.parse("w4a4kv4static"),
                   torch.float32)  # fmt: skip


@pytest.fixture(scope="module", params=["affinequant-online", "quarot", "rtn"])
def finished(request: pytest.FixtureRequest, fit: Callable[..., Path], tmp_path_factory) -> Path:
    """A run of each kind: learnt scales, found ones, and none but the scheme's; adapted where a clip would be."""
    epochs = 2 if request.param == "affinequant-online" else 0
    out = tmp_path_factory.mktemp("static") / request.param
    return fit("w4a8kv4staticx8", out, f"--trainer.max_epochs={epochs}", config=f"{request.param}.yaml")


def test_checkpoint_scores_as_in_the_table(finished: Path, text_file: Path, tmp_path: Path) -> None:
    main(
        ["test", f"--model.pretrained={finished / 'checkpoint'}", f"--data.source={text_file}", "--data.length=32"]
        + ["--trainer.accelerator=cpu", f"--out={tmp_path / 'scored'}"]
    )
    scored = json.loads((tmp_path / "scored/test.json").read_text())["rows"][-1]
    row = json.loads((finished / "results.json").read_text())["rows"][-1]
    assert scored["perplexity"] == row["perplexity"]


@torch.no_grad()
def test_runtime_rounds_as_it_was_calibrated(finished: Path) -> None:
    """With and without a cache, and the grids decide: without them the logits are others."""
    scheme, checkpoint = read(finished / "checkpoint")
    assert str(scheme) == "w4a8kv4staticx8"
    steps = {name: tuple(checkpoint[name].shape) for name in checkpoint if name.endswith("_step")}
    assert len(steps) == 4 and set(steps.values()) == {(2, 2)}
    reference, _, _ = open_model(str(finished / "checkpoint"), torch.float32)
    with quantized(reference.model.layers, scheme):
        expected = reference(IDS, use_cache=False).logits
    model = AutoModelForCausalLM.from_pretrained(finished / "checkpoint", dtype=torch.float32)
    assert_close("packed", expected, model(IDS, use_cache=False).logits, 0.05)
    whole, cache, parts = model(IDS, use_cache=False).logits, None, []
    for position in range(IDS.shape[1]):
        answer = model(IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        parts.append(answer.logits)
    assert_close("token by token", whole, torch.cat(parts, 1), 0.05)
    for _, online in carried(model):
        for operation in (each for each in online if isinstance(each, CacheGrid)):
            operation.key_step.mul_(16)
            operation.value_step.mul_(16)
    assert relative_error(whole, deploy.fuse(model)(IDS, use_cache=False).logits) > 0.05, "negative control"
