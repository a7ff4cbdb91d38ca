"""Every file in configs/ is a method that can be run, and a slip of the pen in one is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers import CONFIGS
from lightning.pytorch import Callback

import callbacks
from aq_lightning.cli import CommandLine, main
from aq_lightning.models.llama import SPEC

FILES = sorted(CONFIGS.glob("*.yaml"))
SITES = {site.name for site in SPEC.sites}


@pytest.fixture
def instantiated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., CommandLine]:
    """Parses arguments and builds everything that they describe, without running it."""
    monkeypatch.setattr(CommandLine, "_run_subcommand", lambda self, subcommand: None)
    return lambda *arguments: CommandLine(["fit", *arguments])


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """What the parser says to a changed affinequant.yaml, or to arguments, that it must refuse."""

    def run(old: str, new: str, *arguments: str) -> str:
        text = (CONFIGS / "affinequant.yaml").read_text()
        assert old in text
        (tmp_path / "changed.yaml").write_text(text.replace(old, new))
        with pytest.raises(SystemExit) as exit:
            main(["fit", f"--config={tmp_path / 'changed.yaml'}", f"--out={tmp_path / 'run'}", *arguments])
        assert exit.value.code == 2 and not (tmp_path / "run").exists()
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return run


def name(path: Path) -> str:
    return path.name


def test_there_are_configs() -> None:
    assert {"affinequant.yaml", "demo.yaml"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_config_instantiates(instantiated: Callable[..., CommandLine], path: Path) -> None:
    cli = instantiated(f"--config={path}")
    given = yaml.safe_load(path.read_text())
    recipe = cli.model.recipe
    assert set(recipe.transforms) == set(given.get("model", {}).get("transforms") or {}) <= SITES
    for site, factories in recipe.transforms.items():
        for factory, factor in zip(factories, given["model"]["transforms"][site], strict=True):
            assert callable(factory) and factor["class_path"].startswith("aq_lightning.transforms.")
    assert str(recipe.scheme) == given.get("model", {}).get("scheme", "w4a16")
    if "max_epochs" in given.get("trainer", {}):
        assert cli.trainer.max_epochs == given["trainer"]["max_epochs"]
    paths = [each["class_path"] for each in given.get("trainer", {}).get("callbacks") or []]
    for each in paths:
        package, _, kind = each.rpartition(".")
        assert package == "callbacks" and issubclass(getattr(callbacks, kind), Callback)
        assert any(type(callback).__name__ == kind for callback in cli.trainer.callbacks)


def test_affinequant_uses_every_callback() -> None:
    ours = {kind.__name__ for kind in vars(callbacks).values() if isinstance(kind, type) and issubclass(kind, Callback)}
    files = {path.stem for path in Path(callbacks.__file__).parent.glob("*.py")} - {"__init__"}
    given = yaml.safe_load((CONFIGS / "affinequant.yaml").read_text())
    used = {each["class_path"].rpartition(".")[2] for each in given["trainer"]["callbacks"]}
    assert used == ours and len(files) == len(ours)


def test_values_reach_the_objects(instantiated: Callable[..., CommandLine]) -> None:
    cli = instantiated(
        f"--config={CONFIGS / 'affinequant.yaml'}", "--model.scheme=w3a16g32", "--model.learning_rates.transform=0.25",
        "--model.plan.size=2", "--trainer.max_epochs=3", "--data.samples=7", "--model.decay=cosine",
    )  # fmt: skip
    recipe = cli.model.recipe
    assert (str(recipe.scheme), recipe.learning_rates.transform, recipe.plan.size) == ("w3a16g32", 0.25, 2)
    assert recipe.learning_rates.clipping == 1e-2, "the neighbour keeps its value"
    assert (cli.trainer.max_epochs, recipe.decay) == (3, "cosine")


def test_scheme_spelled_out(instantiated: Callable[..., CommandLine], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {scheme: {weight: {bits: 3, group_size: 32}, activation: null}}\n")
    assert str(instantiated(f"--config={tmp_path / 'mine.yaml'}").model.recipe.scheme) == "w3a16g32"


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("  scheme:", "  schem:", "schem"),
        ("max_epochs:", "max_epoch:", "max_epoch"),
        ("stability:", "stabilityy:", "stabilityy"),
        ("weight_decay:", "weight_decai:", "weight_decai"),
        ("same_input:", "same_imput:", "same_imput"),
        ("clipping: 1.0e-2", "cliping: 1.0e-2", "cliping"),
        ("  samples:", "  sample:", "sample"),
        ("trainer:", "trainers:", "trainers"),
        ("aq_lightning.transforms.Affine", "aq_lightning.transforms.Afine", "Afine"),
        ("aq_lightning.quantizers.LearnedClipping", "aq_lightning.quantizers.Learned", "Learned"),
        ("callbacks.GradualMask", "callbacks.GradualMasks", "GradualMasks"),
    ],
)
def test_misspelt_key_in_a_file(refusal: Callable[..., str], old: str, new: str, named: str) -> None:
    assert named in refusal(old, new)


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("stability: 0.1", "stability: much", "stability"),
        ("batch_size: 4", "batch_size: four", "batch_size"),
        ("max_epochs: 20", "max_epochs: twenty", "max_epochs"),
        ("transform: 5.0e-3", "transform: [1]", "transform"),
        ("same_input: true", "same_input: 3", "same_input"),
        ("length: 2048", "length: 2048.5", "length"),
        ("  transforms:", "  transforms: 3\n  plan:", "transforms"),
    ],
)
def test_wrong_type_in_a_file(refusal: Callable[..., str], old: str, new: str, named: str) -> None:
    assert named in refusal(old, new)


@pytest.mark.parametrize(
    "argument",
    ["--model.schme=w4a16", "--data.smaples=3", "--trainer.max_epoch=3", "--model.plan.siz=2", "--aut=x", "--ou=x"],
)
def test_misspelt_argument(refusal: Callable[..., str], argument: str) -> None:
    """A shortened option is refused too, although it could be completed."""
    assert argument.split("=")[0].lstrip("-") in refusal("scheme", "scheme", argument)


@pytest.mark.parametrize(
    "argument",
    ["--model.batch_size=four", "--trainer.max_epochs=1.5", "--data.samples=many", "--model.streams.dtype=int8"],
)
def test_wrong_type_of_an_argument(refusal: Callable[..., str], argument: str) -> None:
    key, value = argument.lstrip("-").split("=")
    message = refusal("scheme", "scheme", argument)
    assert key.rpartition(".")[2] in message and value in message


def test_print_config_replays(
    capsys: pytest.CaptureFixture, instantiated: Callable[..., CommandLine], tmp_path
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["fit", f"--config={CONFIGS / 'affinequant.yaml'}", "--model.scheme=w3a16g64", "--print_config"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0
    parsed = yaml.safe_load(printed)
    assert parsed["model"]["scheme"] == "w3a16g64" and parsed["seed_everything"] == 42
    assert [each["class_path"] for each in parsed["trainer"]["callbacks"]][0] == "callbacks.GradualMask"
    (tmp_path / "printed.yaml").write_text(printed)
    assert str(instantiated(f"--config={tmp_path / 'printed.yaml'}").model.recipe.scheme) == "w3a16g64"


def test_help_names_the_stable_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--help"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0
    for option in (
        "--config",
        "--out",
        "--model.pretrained",
        "--model.scheme",
        "--data.source",
        "--trainer.max_epochs",
    ):
        assert option in printed
