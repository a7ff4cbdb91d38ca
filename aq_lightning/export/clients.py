"""Checkpoints as the formats' own clients load them."""

from __future__ import annotations

import importlib.metadata
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel
from transformers.utils import logging

from aq_lightning.errors import ParityError
from aq_lightning.export.base import Client, Subject
from aq_lightning.kernels.layout import Layout
from aq_lightning.models.gguf import ARCHITECTURES

_FLOAT32 = 1e-5  # sums of the same products in another order
_COMPRESSED_TENSORS = "0.17."  # later ones read asymmetric checkpoints with no transformers within the bounds


def dense(subject: Subject) -> Client:
    """transformers itself; weights were rounded to the storage dtype."""
    return Client(_open, rounding(subject.storage))


def none(subject: Subject) -> str:
    """For formats whose clients need a build of torch with CUDA."""
    return "its clients are not installed here"


def compressed_tensors(subject: Subject, layout: Layout) -> Client | str:
    """transformers with compressed-tensors, whose logits are ours to the last bit.

    Experts, and linears that have a class of their own, it dequantizes into the storage dtype instead.
    """
    try:
        version = importlib.metadata.version("compressed-tensors")
    except importlib.metadata.PackageNotFoundError:
        return "compressed-tensors is not installed"
    if not version.startswith(_COMPRESSED_TENSORS):
        return f"compressed-tensors {version} is installed, {_COMPRESSED_TENSORS}x is needed"
    if layout != "padded" and subject.scheme.weight.bits in (3, 5, 6, 7):
        return f"compressed-tensors {version} does not read the {layout} layout of {subject.scheme}"
    if subject.experts:
        if subject.scheme.activation is not None or not subject.scheme.weight.symmetric:
            return f"transformers reads experts of symmetric schemes of weights only, not of {subject.scheme}"
        return Client(_open, rounding(subject.storage))
    own = {type(linear).__name__ for linear in subject.linears().values() if type(linear) is not nn.Linear}
    if own and subject.scheme.activation is not None:
        return f"transformers quantizes no input of {own.pop()}"
    if own:
        dequantized = CompressedTensorsConfig(dequantize=True)
        return Client(partial(_open, quantization_config=dequantized), rounding(subject.storage))
    return Client(_open)


def gguf(subject: Subject, kind: str) -> Client:
    """transformers with the package gguf, given the configuration, of which it reads only a part from the file.

    A model type that GGUF knows under another name it loads as that one, which computes the same, from the file alone.
    """
    config = subject.model_config
    given = {"config": config} if ARCHITECTURES[config.model_type].name == config.model_type else {}

    def load(directory: Path) -> PreTrainedModel:
        (file,) = directory.glob("*.gguf")
        return _open(directory, gguf_file=file.name, **given)

    return Client(load, 4 * rounding(torch.float16) if kind == "Q4_1" else _FLOAT32)  # m is many steps, rounded


def rounding(storage: torch.dtype) -> float:
    """What rounding every weight to ``storage`` may do to logits: 16 units in the last place."""
    return 16 * torch.finfo(storage).eps


def _open(directory: Path, **options: object) -> PreTrainedModel:
    """
    Raises:
        ParityError: transformers does not load the directory.
    """
    with quietly():
        try:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ParityError(f"transformers must load what is written, got from {directory}: {error}") from error
    return model.eval().requires_grad_(False)


@contextmanager
def quietly() -> Iterator[None]:
    """Without progress bars, reports and warnings: whatever matters shows in the logits."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # where clients' bars go
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
