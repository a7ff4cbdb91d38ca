"""The gate before a checkpoint is declared done: what was written says what the quantized model says.

1. Every weight, read back from the files, stands for the same numbers, bit for bit.
2. The format's client, if one is installed, answers a fixed prompt as the fake-quantized model does in float32:
   exactly, or within the format's stated tolerance.

The first covers all weights, one shard at a time. The second takes a few blocks from the start, whatever their number,
so that host memory stays flat: a model of no more as it was written, else a copy of its first blocks, written again
from what was read back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aq_lightning.durable import write_text
from aq_lightning.errors import ParityError
from aq_lightning.export.base import Client, Format, Subject, Weights
from aq_lightning.export.clients import quietly
from aq_lightning.export.loading import model_of
from aq_lightning.models.lookup import architecture_of
from aq_lightning.qtensor import QTensor
from aq_lightning.quantizers import quantized
from aq_lightning.scheme import Scheme
from aq_lightning.transforms.online import carrier

RECORD = "parity.json"
_BLOCKS = 8  # that answer the prompt at most
_MEMORY = 2 * 2**30  # bytes of them at most, in float32, unless one takes more
_PROMPT = 16  # tokens


@dataclass(frozen=True)
class Verdict:
    """What the gate has seen."""

    weights: int
    """Tensors that were equal, bit for bit."""
    client: str
    """What was asked of whom, in words."""

    def __str__(self) -> str:
        return f"{self.weights} tensors read back bit for bit; {self.client}"

    def record(self, directory: Path) -> None:
        """Leaves itself in the directory; the inverse of :meth:`recorded`."""
        write_text(directory / RECORD, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def recorded(cls, directory: Path) -> Verdict:
        """What was seen when the directory was written."""
        return cls(**json.loads((directory / RECORD).read_text(encoding="utf-8")))


def check(directory: Path, form: Format, subject: Subject, shards: Iterable[Weights]) -> Verdict:
    """Compares a written directory with the model that it is to hold.

    Args:
        directory: complete, as :attr:`Format.write` left it.
        form: of the directory.
        subject: the model.
        shards: all its weights, unpacked; consumed lazily.

    Raises:
        ParityError: anything differs; the message says what.
    """
    cut = _first_blocks(subject)
    _, found = form.read(directory)
    compared: set[str] = set()
    differences: list[str] = []
    kept: dict[str, Tensor] = {}
    for shard in shards:
        for name, value in shard.items():
            problem = difference(value, found[name]) if name in found else "is missing"
            differences += [f"{name} {problem}"] if problem else []
            compared.add(name)
            if cut.holds(name):
                dense = value.dequantize(torch.float32) if isinstance(value, QTensor) else value
                kept[name] = dense.float() if dense.is_floating_point() else dense
    differences += [f"{name} is unknown" for name in sorted(set(found) - compared)]
    if differences:
        raise ParityError(
            f"A checkpoint must hold the quantized model's weights bit for bit, got {len(differences)} of "
            f"{len(compared)} that differ in {directory}: {'; '.join(differences[:3])}."
        )
    own = {"its online products": any(carrier(name) for name in compared)}
    own["its quantized cache"] = subject.scheme.key_value is not None
    parts = [part for part, there in own.items() if there]
    client = f"{' and '.join(parts)} run in aq_lightning only" if parts else form.client(subject)
    if isinstance(client, str):
        return Verdict(len(compared), f"not loaded by a client ({client})")
    reference = logits(model_of(cut.subject.model_config, kept, torch.float32), subject.scheme)
    del kept
    return Verdict(len(compared), _ask(client, directory, form, cut, found, reference))


def difference(expected: QTensor | Tensor, found: QTensor | Tensor) -> str:
    """How two weights differ as numbers, in words; empty if they do not.

    Quantized ones are the same if ``u − z`` and, for every group that is not all zero, s are, however long the groups
    are in which a format repeats them, and if one grid has the same codes. Rounded to an ordinary tensor, a weight is
    compared with its value in that dtype.
    """
    if isinstance(expected, QTensor) and isinstance(found, QTensor):
        return _quantized_difference(expected, found)
    if isinstance(expected, QTensor):
        expected = expected.dequantize(found.dtype)
    if isinstance(found, QTensor):
        return "is quantized"
    if expected.shape != found.shape:
        return f"has shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    wrong = int((expected != found).sum())
    return f"differs in {wrong} of {expected.numel()} numbers" if wrong else ""


@torch.no_grad()
def logits(model: PreTrainedModel, scheme: Scheme | None = None) -> Tensor:
    """Answer to the fixed prompt, (1, tokens, vocabulary), quantized in the blocks as the scheme says."""
    tokens = torch.arange(_PROMPT)[None] * 7919 % model.config.vocab_size  # (1, tokens)
    blocks = model.get_submodule(architecture_of(model.config).blocks)
    with quietly(), quantized(blocks, scheme):
        return model(input_ids=tokens, use_cache=False).logits.float()


@dataclass(frozen=True)
class _FirstBlocks:
    """The start of a model."""

    subject: Subject
    """The model, cut."""
    whole: bool
    """Whether nothing was cut."""
    count: int
    """Blocks."""
    prefix: str
    """Of the blocks' tensors."""

    def holds(self, name: str) -> bool:
        inside = name.removeprefix(self.prefix)
        return inside == name or int(inside.partition(".")[0]) < self.count


def _first_blocks(subject: Subject) -> _FirstBlocks:
    blocks, config = subject.blocks(), subject.model_config
    size = max(4 * sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    count = min(len(blocks), _BLOCKS, max(1, _MEMORY // size))
    config.num_hidden_layers = count
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = kinds[:count]
    whole = count == len(blocks)
    cut = (
        subject
        if whole
        else replace(subject, config={**config.to_dict(), "architectures": subject.config.get("architectures")})
    )
    return _FirstBlocks(cut, whole, count, f"{architecture_of(config).blocks}.")


def _ask(client: Client, directory: Path, form: Format, cut: _FirstBlocks, found: Weights, reference: Tensor) -> str:
    with TemporaryDirectory() as scratch:
        if not cut.whole:
            directory, subject = Path(scratch) / "first", cut.subject
            tensors: Mapping = form.pack({name: found[name] for name in found if cut.holds(name)}, subject.scheme)
            form.write(
                directory, subject.config, [tensors], subject.scheme, ignore=subject.ignore, extra_files=subject.files
            )
        answer = logits(client.open(directory))
    error = float((answer - reference).norm() / reference.norm())
    what = f"{'all' if cut.whole else 'the first'} {cut.count} blocks"
    if not error <= client.tolerance:
        raise ParityError(
            f"A client's logits must differ from the quantized model's by at most {client.tolerance:.1e} (RMS over "
            f"RMS), got {error:.1e} for {what} of {directory}: the format does not hold this model."
        )
    return f"transformers' logits differ by {error:.1e} with {what} (at most {client.tolerance:.1e})"


def _quantized_difference(expected: QTensor, found: QTensor) -> str:
    if expected.codes.shape != found.codes.shape:
        return f"has shape {tuple(found.codes.shape)}, not {tuple(expected.codes.shape)}"
    if expected.grid == found.grid and all(
        torch.equal(getattr(expected, part), getattr(found, part)) for part in ("codes", "scale", "zero")
    ):
        return ""
    size = min(expected.codes.shape[1] // tensor.scale.shape[1] for tensor in (expected, found))
    (numbers, scale), (other, other_scale) = (_numbers(tensor, size) for tensor in (expected, found))
    codes = int((numbers != other).sum())
    if found.grid == expected.grid:
        codes = max(codes, int((expected.codes != found.codes).sum()))
    scales = int(((scale != other_scale) & (numbers != 0).any(-1)).sum())
    if not codes and not scales:
        return ""
    return f"differs in {codes} of {numbers.numel()} codes and {scales} of {scale.numel()} scales"


def _numbers(tensor: QTensor, size: int) -> tuple[Tensor, Tensor]:
    """``u − z`` (out, groups, size) and s (out, groups) in groups of ``size``, which divides the tensor's own."""
    groups = tensor.codes.shape[1] // size
    repeat = groups // tensor.scale.shape[1]
    scale = tensor.scale.repeat_interleave(repeat, 1)
    zero = tensor.zero.repeat_interleave(repeat, 1).to(torch.int16)
    return tensor.codes.unflatten(1, (groups, size)).to(torch.int16) - zero[..., None], scale
