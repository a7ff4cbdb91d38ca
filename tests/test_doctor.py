"""``doctor``: exact on every architecture, and a wrong site is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import MODELS, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from aq_lightning.cli import main
from aq_lightning.doctor import examine
from aq_lightning.experts import run_here
from aq_lightning.models.loading import Pretrained, Source
from aq_lightning.models.lookup import architecture_of
from aq_lightning.models.sites import Group
from aq_lightning.transforms import Factor


@pytest.fixture
def pretrained() -> Callable[[str], Pretrained]:
    """A model as loading gives it, HF's own norms and all."""

    def build(name: str) -> Pretrained:
        config = tiny_config(name)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        run_here(model.config)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        return Pretrained(Source("here"), model, PreTrainedTokenizerFast, architecture_of(config))

    return build


@pytest.mark.parametrize("name", list(MODELS))
def test_every_architecture_is_exact(pretrained: Callable[[str], Pretrained], name: str) -> None:
    findings = list(examine(pretrained(name)))
    assert {finding.site.name for finding in findings} >= {"attention_input", "value_output"}
    assert all(finding.exact or finding.refusal for finding in findings), [str(f) for f in findings]
    assert sum(finding.exact for finding in findings) >= 4


def test_a_wrong_site_is_found_out(pretrained: Callable[[str], Pretrained]) -> None:
    """Negative control: a diagonal does not commute with rotary embedding, nor may a consumer be forgotten."""
    model = pretrained("llama")
    sites = {site.name: site for site in model.architecture.sites}
    wrong = (
        replace(sites["query_key"], absorbs=frozenset({Group.DIAGONAL})),
        replace(sites["mlp_input"], consumers=sites["mlp_input"].consumers[:1], absorbs=frozenset({Group.DIAGONAL})),
    )
    findings = list(examine(replace(model, architecture=replace(model.architecture, sites=wrong))))
    diagonal = [kind for kind in Factor.__subclasses__() if kind.group is Group.DIAGONAL]
    assert len(findings) == 2 * len(diagonal) and not any(finding.exact for finding in findings)
    assert all("NOT EXACT" in str(finding) for finding in findings)


def test_command(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["doctor", f"--model={model_directory}"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and "everything that folds is exact" in printed
    assert all(site in printed for site in ("attention_input", "query_key", "value_output", "mlp_input", "mlp_hidden"))
    with pytest.raises(SystemExit) as exit:
        main(["doctor", f"--model={tmp_path / 'nothing'}"])
    assert exit.value.code == 2 and "does not exist" in capsys.readouterr().err
