"""QuaRot, SpinQuant and FlatQuant as configurations: whole runs on a model whose head is tied to its embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama, word_tokenizer
from transformers import OPTConfig, OPTForCausalLM

from aq_lightning.cli import main
from aq_lightning.export.compressed_tensors import read
from aq_lightning.export.loading import open_model
from aq_lightning.transforms.online import carrier

IDS = torch.arange(2 * 24).reshape(2, 24) * 7 % 96
SCHEME = "w4a4kv4sym"
SHORT = ["--model.rotation.training.steps=20", "--model.rotation.training.batch_size=4"]
PRODUCTS = {"left", "right", "query", "key"}
CLIPS = {"clip", "key_clip", "value_clip"}
LEAVES = {"quarot": PRODUCTS | CLIPS, "spinquant": PRODUCTS, "flatquant": PRODUCTS | CLIPS | {"heads"}}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tied")
    tiny_llama(tie_word_embeddings=True).half().save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["quarot", "spinquant", "flatquant"])
def run(request: pytest.FixtureRequest, tied: Path, fit: Callable[..., Path], tmp_path_factory) -> Path:
    more = [f"--trainer.max_epochs={2 * (request.param == 'flatquant')}"]
    more += SHORT if request.param == "spinquant" else []
    out = tmp_path_factory.mktemp("runs") / request.param
    return fit(SCHEME, out, f"--model.pretrained={tied}", *more, config=f"{request.param}.yaml")


def last_row(run: Path, file: str = "results.json") -> dict:
    return json.loads((run / file).read_text())["rows"][-1]


def test_checkpoint_scores_as_in_the_table(run: Path, text_file: Path, tmp_path: Path) -> None:
    main(
        ["test", f"--model.pretrained={run / 'checkpoint'}", f"--data.source={text_file}", "--data.length=32"]
        + ["--trainer.accelerator=cpu", f"--out={tmp_path / 'scored'}"]
    )
    scored, row = last_row(tmp_path / "scored", "test.json"), last_row(run)
    assert {name: scored[name] for name in row} == {**row, "model": str(run / "checkpoint")}


def test_what_the_checkpoint_holds(run: Path) -> None:
    """A rotated head is a matrix of its own, and gains are in the linears; all online parts are where they belong."""
    scheme, checkpoint = read(run / "checkpoint")
    config = json.loads((run / "checkpoint/config.json").read_text())
    assert str(scheme) == SCHEME and config["tie_word_embeddings"] == (run.name == "flatquant")
    assert ("lm_head.weight" in checkpoint) == (run.name != "flatquant")
    norms = [checkpoint[name] for name in checkpoint if "norm" in name and not carrier(name)]
    assert all((norm == 1).all() for norm in norms) == (run.name != "flatquant")
    leaves = {name.rpartition(".")[2] for name in checkpoint if carrier(name)}
    assert leaves == LEAVES[run.name]


@torch.no_grad()
def test_the_rotated_model_is_that_model(run: Path, tied: Path) -> None:
    """Quantized, its logits are nearer to the full-precision ones than those of another model of the same size."""
    expected = open_model(str(tied), torch.float32)[0](IDS).logits
    found = open_model(str(run / "checkpoint"), torch.float32)[0](IDS).logits
    near = (found - expected).norm() / expected.norm()
    far = (found.roll(1, -1) - expected).norm() / expected.norm()
    assert near < 0.3 < far


@pytest.mark.parametrize("run", ["flatquant"], indirect=True)
def test_inputs_of_the_full_precision_model(run: Path, tied: Path, fit: Callable[..., Path], tmp_path: Path) -> None:
    """FlatQuant's second block is fitted to what no quantized block has touched: as if the first were unquantized."""
    out = fit(
        SCHEME, tmp_path / "run", f"--model.pretrained={tied}", "--trainer.max_epochs=2", "--model.inputs=quantized",
        config="flatquant.yaml",
    )  # fmt: skip
    blocks = [json.loads((each / "results.json").read_text())["blocks"] for each in (run, out)]
    assert blocks[0][0]["loss"] == blocks[1][0]["loss"] and blocks[0][1]["rtn_loss"] < blocks[1][1]["rtn_loss"]


def test_refused_where_it_cannot_rotate(fit: Callable[..., Path], tmp_path: Path, capsys) -> None:
    config = OPTConfig(vocab_size=96, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
                       word_embed_proj_dim=64, max_position_embeddings=128)  # fmt: skip
    OPTForCausalLM(config).half().save_pretrained(tmp_path / "opt")
    word_tokenizer().save_pretrained(tmp_path / "opt")
    with pytest.raises(SystemExit):
        fit(SCHEME, tmp_path / "run", f"--model.pretrained={tmp_path / 'opt'}", config="quarot.yaml")
    assert "leave out model.rotation" in capsys.readouterr().err
