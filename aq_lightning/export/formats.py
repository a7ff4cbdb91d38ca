"""The formats by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from aq_lightning.export import awq, clients, compressed_tensors, dense, gguf, gptq
from aq_lightning.export.base import Format
from aq_lightning.export.compressed_tensors_config import format_of
from aq_lightning.kernels.layout import Layout

Name = Literal["compressed-tensors", "gptq", "gptq_v2", "awq", "gguf-q4_0", "gguf-q4_1", "gguf-q8_0", "dense"]
NAMES: tuple[Name, ...] = get_args(Name)


def named(name: Name, layout: Layout = "padded") -> Format:
    """The format of a name.

    Args:
        name: one of :data:`NAMES`.
        layout: of the words of compressed-tensors.
    """
    return _FORMATS[name](name, layout)


def _compressed_tensors(name: str, layout: Layout) -> Format:
    return Format(
        name,
        check=lambda subject: None,  # it holds every scheme
        pack=lambda weights, scheme: compressed_tensors.pack(weights, layout, format_of(scheme)),
        write=partial(compressed_tensors.write, layout=layout),
        read=compressed_tensors.read,
        client=partial(clients.compressed_tensors, layout=layout),
    )


def _gptq(name: str, layout: Layout) -> Format:
    return Format(
        name,
        check=partial(gptq.check, version=name),
        pack=partial(gptq.pack, version=name),
        write=partial(gptq.write, version=name),
        read=gptq.read,
        client=clients.none,
    )


def _gguf(name: str, layout: Layout) -> Format:
    kind = name.removeprefix("gguf-").upper()
    return Format(
        name,
        check=partial(gguf.check, kind=kind),
        pack=lambda weights, scheme: weights,  # blocks are packed when they are written
        write=partial(gguf.write, kind=kind),
        read=gguf.read,
        client=partial(clients.gguf, kind=kind),
        sharded=False,
    )


_FORMATS: dict[str, Callable[[str, Layout], Format]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "awq": lambda name, layout: Format(name, awq.check, awq.pack, awq.write, awq.read, clients.none),
    "gguf-q4_0": _gguf,
    "gguf-q4_1": _gguf,
    "gguf-q8_0": _gguf,
    "dense": lambda name, layout: Format(name, dense.check, dense.pack, dense.write, dense.read, clients.dense),
}
