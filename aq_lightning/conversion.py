"""A finished run's checkpoint in another format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from aq_lightning.errors import RequestError
from aq_lightning.export import compressed_tensors, formats, parity
from aq_lightning.export.base import Subject, Weights
from aq_lightning.export.card import CARD, Facts, write_card
from aq_lightning.export.directory import CONFIG, INDEX, gathered, read_config, verified
from aq_lightning.export.parity import RECORD, Verdict
from aq_lightning.kernels.layout import Layout
from aq_lightning.models.lookup import architecture_of
from aq_lightning.scheme import Scheme


@dataclass(frozen=True)
class Run:
    """What is needed of a run directory: its checkpoint, and what the card says."""

    path: Path

    def __post_init__(self) -> None:
        if not (self.path / "checkpoint" / CONFIG).is_file():
            raise RequestError(
                f"A run to export holds a finished checkpoint, got {str(self.path)!r} without one: name the --out of "
                "a `fit` that ended."
            )
        method = self._quantization.get("quant_method")
        if method != "compressed-tensors":
            raise RequestError(
                f"A checkpoint to export has transforms that fold, got quant_method {method!r}, whose online "
                "transforms or quantized keys and values no other format holds: calibrate without them."
            )

    @property
    def checkpoint(self) -> Path:
        """Where it lies."""
        return self.path / "checkpoint"

    def subject(self) -> tuple[Subject, Weights]:
        """The model, and lazily its weights."""
        scheme, weights = compressed_tensors.read(self.checkpoint)
        config = read_config(self.checkpoint)
        del config["quantization_config"]
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
        return Subject(config, scheme, dtype, self._quantization.get("ignore", ()), self._companions()), weights

    def facts(self, scheme: Scheme, form: str, verdict: Verdict, file: str) -> Facts:
        """What the card says; the table if the run has one."""
        table = self.path / "results.json"
        rows = json.loads(table.read_text())["rows"] if table.is_file() else ()
        replay = self.path / "config.yaml"
        source = yaml.safe_load(replay.read_text())["model"]["pretrained"] if replay.is_file() else self.path.name
        return Facts(source, str(scheme), form, str(verdict), rows, file)

    @property
    def _quantization(self) -> Mapping:
        return read_config(self.checkpoint).get("quantization_config") or {}

    def _companions(self) -> list[Path]:
        written = (CONFIG, INDEX, CARD, RECORD)
        return sorted(
            path
            for path in self.checkpoint.iterdir()
            if path.is_file() and path.suffix != ".safetensors" and path.name not in written
        )


def convert(
    run: Path, name: formats.Name, out: Path | None = None, layout: Layout | None = None, shard_bytes: int = 4 * 2**30
) -> tuple[Path, Verdict]:
    """Writes a run's model in a format, checks it, and only then gives it its name.

    Args:
        run: run directory with a checkpoint.
        name: of the format.
        out: directory to make; None: ``RUN/<format>``.
        layout: how words are filled, for compressed-tensors alone; None: padded.
        shard_bytes: greatest size of a file of tensors, in formats of several files.

    Returns:
        The directory, and what the check has seen.

    Raises:
        RequestError: there is no checkpoint, or the format cannot hold it.
        ParityError: the result does not say what the checkpoint says; it stays as ``<out>.unverified``.
    """
    if layout is not None and name != "compressed-tensors":
        raise RequestError(f"Only compressed-tensors has layouts, got layout {layout} for {name}: leave it out.")
    source = Run(run)
    subject, weights = source.subject()
    form = formats.named(name, layout or "padded")
    form.check(subject)
    out = run / name if out is None else out
    with verified(out) as unverified:
        packed = (form.pack(shard, subject.scheme) for shard in _blocks(subject, weights))
        form.write(
            unverified,
            subject.config,
            gathered(packed, shard_bytes) if form.sharded else packed,
            subject.scheme,
            ignore=subject.ignore,
            extra_files=subject.files,
        )
        verdict = parity.check(unverified, form, subject, _blocks(subject, weights))
        verdict.record(unverified)
        file = next((path.name for path in unverified.glob("*.gguf")), "")
        write_card(unverified, source.facts(subject.scheme, name, verdict, file), out.name)
    return out, verdict


def describe(checkpoint: Path, source: str, scheme: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Puts the card into a run's own checkpoint, once it is scored.

    Args:
        checkpoint: directory, checked.
        source: the model that was quantized.
        scheme: its integers.
        rows: the final table.

    Returns:
        What the check has seen.
    """
    verdict = str(Verdict.recorded(checkpoint))
    form = read_config(checkpoint)["quantization_config"]["quant_method"]
    write_card(checkpoint, Facts(source, scheme, form, verdict, rows), checkpoint.name)
    return verdict


def _blocks(subject: Subject, weights: Weights) -> Iterator[Weights]:
    """What lies outside the blocks, then each block's weights."""
    prefix = f"{architecture_of(subject.model_config).blocks}."
    shards: dict[int, list[str]] = {-1: []}
    for name in weights:
        index = int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else -1
        shards.setdefault(index, []).append(name)
    for _, names in sorted(shards.items()):
        yield {name: weights[name] for name in names}
