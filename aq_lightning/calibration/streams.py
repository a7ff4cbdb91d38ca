"""The cached activations that enter a block, and the passes that move them on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aq_lightning.calibration.call import Arguments, BlockFunction, PerSample, answer
from aq_lightning.calibration.products import products
from aq_lightning.errors import RequestError
from aq_lightning.models.lookup import architecture_of
from aq_lightning.models.sites import Architecture
from aq_lightning.recipe import StreamStorage


@dataclass(frozen=True)
class Streams:
    """Both streams entering a block, each (samples, length, hidden)."""

    full: Tensor
    """What the full-precision model computes."""
    quantized: Tensor
    """What the model with all earlier blocks quantized computes."""
    written: Tensor | None = None
    """What the full-precision model computes of windows that it wrote itself, (windows, length, hidden)."""

    @classmethod
    def entering(cls, stream: Tensor, samples: int) -> Streams:
        """What enters block 0, of which so many samples are calibration's and those behind them are written."""
        return cls(stream[:samples], stream[:samples], stream[samples:] if len(stream) > samples else None)

    def all_full(self, storage: StreamStorage, device: torch.device) -> Tensor:
        """What the full-precision model computes of all windows, in the order in which they entered block 0."""
        if self.written is None:
            return self.full
        return storage.store(torch.cat([self.full, self.written]), device)

    def stored(self, storage: StreamStorage, device: torch.device) -> Streams:
        """All in their dtype and place, ``device`` being the blocks'."""
        return Streams(**{name: storage.store(stream, device) for name, stream in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {name: stream for name, stream in vars(self).items() if stream is not None}


@torch.no_grad()
def capture(
    model: PreTrainedModel, windows: Tensor, storage: StreamStorage, device: torch.device
) -> tuple[Tensor, list[Arguments]]:
    """Inputs of block 0 for every window, and every block's other arguments.

    The model runs with each block replaced, for this pass only, by one that hands its input on: nothing of the blocks
    is computed or even needs to be loaded. Behind the first window, which tells the arguments of all blocks, the model
    is left where block 0 would begin.

    Args:
        model: causal language model whose parts outside the blocks are loaded; these are left in float32.
        windows: int64 (samples, length).
        storage: precision and place of the stream.
        device: where blocks will work.

    Returns:
        (samples, length, hidden), and one :data:`Arguments` per block.
    """
    architecture = architecture_of(model.config)
    blocks = model.get_submodule(architecture.blocks)
    outside = _outside(model, blocks)
    for parameter in outside:
        parameter.data = parameter.data.float()  # so that embeddings and rotary tables come in full precision
    inputs: list[Tensor] = []
    with _passing_through(blocks, architecture, inputs) as arguments:
        for window in windows:  # one at a time: every argument keeps a batch dimension of 1, which broadcasts
            with suppress(_Entered):
                model.base_model(input_ids=window[None].to(outside[0].device), use_cache=False)
                blocks[0].forward = partial(_enter, inputs)
            inputs[-1] = inputs[-1].to("cpu" if storage.place == "host" else device).to(storage.torch_dtype)
    stream = storage.store(torch.cat(inputs), device)
    return check_finite(stream, bool(torch.isfinite(stream).all())), arguments


class _Entered(Exception):
    """What enters block 0 is known."""


def _enter(inputs: list[Tensor], hidden: Tensor, **_: object) -> None:
    inputs.append(hidden)
    raise _Entered


@contextmanager
def hidden_states(model: PreTrainedModel, stream: Tensor) -> Iterator[None]:
    """While it is open, the model's blocks answer the windows of a stream, one batch after the other from the first.

    Args:
        model: causal language model; its blocks need no weights.
        stream: what the last block answers, (samples, length, hidden), anywhere.
    """
    architecture = architecture_of(model.config)
    blocks = model.get_submodule(architecture.blocks)
    taken = 0

    def last(hidden: Tensor, **_: object) -> Tensor | tuple[Tensor, None]:
        nonlocal taken
        taken += len(hidden)
        answers = stream[taken - len(hidden) : taken].to(hidden)
        return (answers, None) if architecture.returns_tuple else answers

    with _passing_through(blocks, architecture, []):
        blocks[-1].forward = last
        yield


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """What a model answers whose last block answers ``hidden``, (batch, length, hidden) → (batch, length, vocabulary);
    differentiable.

    Args:
        model: causal language model; its blocks need no weights.
        hidden: on its device.
    """
    with hidden_states(model, hidden):
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)  # they do not matter
        return model(input_ids=tokens, use_cache=False).logits


@contextmanager
def _passing_through(
    blocks: Sequence[nn.Module], architecture: Architecture, inputs: list[Tensor]
) -> Iterator[list[Arguments]]:
    """Blocks return their input; block 0's inputs go to ``inputs``, each block's arguments into the list yielded."""
    arguments: list[Arguments] = [{} for _ in blocks]

    def stand_in(index: int):
        def forward(hidden: Tensor, **others: object) -> Tensor | tuple[Tensor, None]:
            if index == 0:
                inputs.append(hidden)
            arguments[index] = {
                name: PerSample(value) if name in architecture.per_sample and isinstance(value, Tensor) else value
                for name, value in others.items()
            }
            return (hidden, None) if architecture.returns_tuple else hidden

        return forward

    for index, block in enumerate(blocks):
        block.forward = stand_in(index)
    try:
        yield arguments
    finally:
        for block in blocks:
            del block.forward


@torch.no_grad()
def each_answer(
    blocks: Sequence[BlockFunction],
    arguments: Sequence[Arguments],
    stream: Tensor,
    batch_size: int,
    device: torch.device,
    half: bool = False,
) -> Iterator[tuple[slice, Tensor]]:
    """Passes a stream through blocks, in float32; on a GPU products are as exact as a 16-bit stream that keeps them.

    Args:
        blocks: consecutive blocks on the device, or what stands for them.
        arguments: of each block, on the device.
        stream: (samples, length, hidden), anywhere.
        batch_size: samples per pass; half as many where memory runs out.
        device: the blocks'.
        half: whether linears and attention compute in float16, which has the digits of TensorFloat32, not its reach.

    Yields:
        Which samples, and what is answered to them, (batch, length, hidden) in the stream's dtype, on the device: what
        is computed there is not computed by the host, and dtypes are changed there.
    """
    start = 0
    while start < len(stream):
        answered = None
        with suppress(*(torch.OutOfMemoryError,) if batch_size > 1 else ()):
            hidden = stream[start : start + batch_size].to(device, non_blocking=True).float()
            with products(stream.dtype, device), torch.autocast(device.type, torch.float16, enabled=half):
                for block, others in zip(blocks, arguments, strict=True):
                    hidden = answer(block, hidden, others)
            answered = hidden.to(stream.dtype)
        hidden = None
        if answered is None:
            batch_size = (batch_size + 1) // 2
            continue
        where = slice(start, start + len(answered))
        yield where, answered
        answered, start = None, where.stop  # the next pass has its memory


def run(
    blocks: Sequence[BlockFunction],
    arguments: Sequence[Arguments],
    stream: Tensor,
    batch_size: int,
    device: torch.device,
    half: bool = False,
) -> Tensor:
    """:func:`each_answer` together: a new stream like the given one."""
    return gathered(each_answer(blocks, arguments, stream, batch_size, device, half), stream)[0]


@torch.no_grad()
def gathered(parts: Iterable[tuple[slice, Tensor]], like: Tensor, into: Tensor | None = None) -> tuple[Tensor, bool]:
    """Parts of a stream on a device as one like another, (samples, length, hidden), and where that is, or in the place
    of a third; and whether all of it is finite."""
    pinned = like.is_pinned()
    result, finite = torch.empty_like(like, pin_memory=pinned) if into is None else into, []
    for where, part in parts:
        result[where].copy_(part, non_blocking=pinned)
        finite.append(torch.isfinite(part).all())
        del part
    return result, bool(torch.stack(finite).all()) if finite else True  # waits for all copies


def _outside(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Parameters of the model that belong to no block."""
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in inside]


def to_device(value: object, device: torch.device) -> object:
    """Moves every tensor inside tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, PerSample):
        return PerSample(value.value.to(device))
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    return value


def check_finite(stream: Tensor, finite: bool) -> Tensor:
    """The stream itself.

    Raises:
        RequestError: it is not finite: it overflows its dtype, or holds NaN.
    """
    if not finite:
        raise RequestError(
            f"A stream holds finite {stream.dtype} numbers, got an overflow or NaN: keep streams in a wider type "
            "(--model.streams.dtype bfloat16 or float32), or check the model's own weights for NaN."
        )
    return stream
