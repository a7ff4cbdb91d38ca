"""The command line's ``fit`` as a function."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aq_lightning.calibration import RunDirectory
from aq_lightning.commandline import CommandLine
from aq_lightning.errors import RequestError
from aq_lightning.evaluation import Row
from aq_lightning.methods import method_file
from aq_lightning.quiet import quiet


@dataclass(frozen=True)
class Quantized:
    """What :func:`quantize` made."""

    run: Path
    """The run's directory: blocks, logs, ``report.html``, ``results.json``."""
    rows: tuple[Row, ...]
    """Perplexity and bits per weight: full precision, round to nearest, the method last."""

    @property
    def checkpoint(self) -> Path:
        """What ``AutoModelForCausalLM.from_pretrained`` loads."""
        return RunDirectory(self.run).checkpoint

    @property
    def perplexity(self) -> float:
        """Of the result."""
        return self.rows[-1].perplexity

    @property
    def bits(self) -> float:
        """Effective bits per weight of the result."""
        return self.rows[-1].bits


def quantize(
    model: str | Path | PreTrainedModel,
    scheme: str = "w4a16g128",
    data: str | Path | Sequence[str] = "wikitext2",
    out: str | Path = "quantized",
    method: str | Path = "affinequant",
    tokenizer: PreTrainedTokenizerBase | None = None,
    options: Mapping[str, Any] | None = None,
) -> Quantized:
    """Calibrates a model and writes its checkpoint, as ``python train.py fit`` does: checks first, goes on where an
    interrupted run stopped, and answers at once if the run is finished.

    Args:
        model: directory with safetensors or GGUF, hub id, ``embedded``, or a model in memory.
        scheme: integers of weights and activations, ``w<bits>a<bits>[g<group size>][sym]``.
        data: calibration text: ``wikitext2``, ``c4``, ``ptb``, ``pile``, ``python``, a file, or texts.
        out: the run's directory. A model in memory and texts lie beside it in ``<out>.source`` until the run ends.
        method: a configuration's name (``affinequant``, ``gptq``, ``awq``, ``rtn``, …) or YAML file.
        tokenizer: of a model in memory.
        options: any field of the configuration by its dotted name, such as ``{"trainer.max_epochs": 10}``.

    Raises:
        RequestError: the request cannot be granted; nothing was written to ``out``.
        ParityError: the checkpoint does not say what the calibrated model says.
        Interrupted: the run stopped before its end; the same call goes on.
    """
    out = Path(out)
    beside = out.with_name(f"{out.name}.source")
    given = {
        "model.pretrained": _model(model, tokenizer, beside),
        "model.scheme": scheme,
        "data.source": _text(data, beside),
        "out": str(out),
        **(options or {}),
    }
    arguments = [f"--{name}={_spelt(value)}" for name, value in given.items()]
    with warnings.catch_warnings():
        quiet()
        try:
            _Call(["fit", f"--config={method_file(method)}", *arguments])
        except ArgumentError as error:
            raise RequestError(f"Options are fields of the configuration, got one that is not: {error}") from error
    if beside.exists():
        shutil.rmtree(beside)
    rows = (RunDirectory(out).results or {})["rows"]
    return Quantized(out, tuple(Row(**row) for row in rows))


class _Call(CommandLine):
    """The command line, except that a wrong argument raises."""

    def init_parser(self, options: type | None = None, **settings: object) -> LightningArgumentParser:
        return super().init_parser(options, **settings, exit_on_error=False)


def _model(model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, beside: Path) -> str:
    """Where the model's files are."""
    if not isinstance(model, PreTrainedModel):
        return str(model)
    if tokenizer is None:
        raise RequestError("A model in memory comes with its tokenizer, got none: pass tokenizer=….")
    directory = beside / (Path(model.config.name_or_path or "model").name)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def _text(data: str | Path | Sequence[str], beside: Path) -> str:
    """The name of the text's source."""
    if isinstance(data, (str, Path)):
        return str(data)
    if not data or not all(isinstance(text, str) for text in data):
        raise RequestError(f"Texts are strings, got {type(data).__name__} of other things: pass a list of str.")
    beside.mkdir(parents=True, exist_ok=True)
    file = beside / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in data), encoding="utf-8")
    return str(file)


def _spelt(value: object) -> str:
    """A value as the command line reads it."""
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n")
