"""GGUF files with Q4_0, Q4_1 or Q8_0 weights: llama.cpp and what is built on it load them, and transformers.

A row of K inputs becomes K / 32 blocks, each with its own scale d, a float16 (repeated where the grid's groups are
longer):

====  ==================================================  =============================================================
Q4_0  d, then 16 bytes ``u_j + 16 u_(j + 16)``            w = (u − 8) d: integers −8 … 7
Q4_1  d, m, then 16 bytes ``u_j + 16 u_(j + 16)``         w = u d + m, m = −z d rounded to float16
Q8_0  d, then 32 int8 ``q_j``                             w = q d: integers −128 … 127
====  ==================================================  =============================================================

With ``q = u − z`` of our grid, Q4_0 holds symmetric grids of up to 4 bits and any of up to 3; Q8_0 symmetric ones of up
to 8 and any of up to 7: all exactly. Q4_1 holds any of up to 4 bits with a rounded m. Norms and biases are float32,
embeddings and the output head keep their dtype. Metadata is written by the package ``gguf``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import gguf
import torch
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.export.base import Subject, Weights, check_no_experts, check_weights_only
from aq_lightning.export.directory import atomic
from aq_lightning.export.gguf_metadata import add_metadata, architecture_of, check_metadata, gguf_name, hf_name, rotary
from aq_lightning.models.gguf import FILE_TYPES
from aq_lightning.models.gguf_tokenizer import tokenizer_metadata
from aq_lightning.qtensor import QTensor
from aq_lightning.scheme import Grid, Scheme

Kind = Literal["Q4_0", "Q4_1", "Q8_0"]
_SIZE = 32  # weights in a block
_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class _Blocks:
    """One kind of block."""

    grid: Grid
    """As what it is read."""
    bits: int
    """Greatest width of any grid; a symmetric one may have :attr:`symmetric_bits`."""
    symmetric_bits: int
    pack: Callable[[Tensor, Tensor, Tensor], list[Tensor]]
    """q (N, blocks, 32), d and z (N, blocks) → bytes of the parts of each block, each (N, blocks, bytes)."""
    unpack: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    """Bytes (N, blocks, bytes) → u (N, blocks, 32), d and z (N, blocks)."""


def check(subject: Subject, kind: Kind) -> None:
    """
    Raises:
        RequestError: activations, bits, groups, the architecture, its biases or its tokenizer cannot be held.
    """
    check_weights_only(subject, kind)
    check_no_experts(subject, kind)
    grid, blocks = subject.scheme.weight, _KINDS[kind]
    if grid.bits > (blocks.symmetric_bits if grid.symmetric else blocks.bits):
        raise RequestError(
            f"{kind} holds up to {blocks.bits} bits, or {blocks.symmetric_bits} with symmetric weights, got "
            f"{subject.scheme}: export gguf-{'q8_0' if grid.bits > 4 else 'q4_1'} or compressed-tensors."
        )
    widths = {linear.weight.shape[1] for linear in subject.linears().values()}
    odd = [width for width in sorted({grid.group_size or _SIZE, *widths}) if width % _SIZE]
    if odd:
        raise RequestError(
            f"{kind} has a scale for each {_SIZE} inputs, got groups or inputs of {odd[0]}: calibrate with groups of a "
            f"multiple of {_SIZE}, or export compressed-tensors."
        )
    check_metadata(subject)
    tokenizer_metadata(subject.files, subject.model_config.vocab_size)


def compress(tensor: QTensor, kind: Kind) -> Tensor:
    """Rows of blocks, uint8 (N, bytes); the inverse of :func:`decompress`.

    Raises:
        RequestError: a scale that matters is no float16.
    """
    count = tensor.codes.shape[1] // _SIZE
    repeat = count // tensor.scale.shape[1]
    zero = tensor.zero.repeat_interleave(repeat, 1).to(torch.int16)  # (N, blocks)
    codes = tensor.codes.unflatten(1, (count, _SIZE)).to(torch.int16)
    numbers = codes - zero[..., None]  # (N, blocks, 32)
    wide = tensor.scale.repeat_interleave(repeat, 1).float()
    scale = wide.half()
    unheld = scale.float() != wide
    if bool((unheld & (numbers != 0).any(-1)).any()):
        raise RequestError(
            f"GGUF holds scales that are float16 numbers, got {float(wide[unheld].flatten()[0]):.3g}: export "
            "compressed-tensors, or calibrate the model from float16 weights."
        )
    scale[unheld] = torch.finfo(torch.float16).smallest_normal  # of blocks of zeros
    return torch.cat(_KINDS[kind].pack(numbers, scale, zero), -1).flatten(1)


def decompress(data: Tensor, kind: Kind) -> QTensor:
    """The weight in its rows of blocks; the inverse of :func:`compress`, as a grid of groups of 32."""
    blocks = _KINDS[kind]
    codes, scale, zero = blocks.unpack(data.unflatten(1, (-1, _bytes(kind))))
    return QTensor(codes.flatten(1), scale, zero, blocks.grid)


def write(
    out: Path,
    source_config: Mapping[str, Any],
    shards: Iterable[Weights],
    scheme: Scheme,
    *,
    kind: Kind,
    ignore: Sequence[str] = (),
    extra_files: Iterable[Path] = (),
) -> None:
    """Writes a directory with one GGUF file atomically; the inverse of :func:`read`.

    Args:
        out: directory to make; may exist if empty.
        source_config: ``config.json`` of the model.
        shards: tensors, consumed lazily.
        scheme: integers of every quantized weight.
        kind: of the quantized blocks.
        ignore: linears in full precision, which are those that are not quantized in ``shards``.
        extra_files: the tokenizer's go into the metadata, others are copied.
    """
    files = tuple(extra_files)
    subject = Subject(source_config, scheme, torch.float16, ignore, files)
    with atomic(out) as partial, TemporaryFile(dir=partial) as data:
        writer = gguf.GGUFWriter(None, architecture_of(subject).name, use_temp_file=True)
        writer.temp_file = data  # beside the result, where there is room for it
        add_metadata(writer, subject, FILE_TYPES[kind])
        for name, tensor in (item for shard in shards for item in shard.items()):
            _add(writer, gguf_name(name), rotary(tensor, name, subject), kind)
        writer.write_header_to_file(partial / f"model-{kind}.gguf")
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        for file in files:
            if "token" not in file.name and file.suffix != ".jinja":
                shutil.copyfile(file, partial / file.name)


class GgufWeights(Mapping[str, "QTensor | Tensor"]):
    """The weights of a GGUF file by their names in transformers, each read from the file when asked for."""

    def __init__(self, file: Path) -> None:
        self._reader = gguf.GGUFReader(file)
        found = ((hf_name(tensor.name), tensor) for tensor in self._reader.tensors)
        self._tensors = {name: tensor for name, tensor in found if name}

    def __getitem__(self, name: str) -> QTensor | Tensor:
        tensor = self._tensors[name]
        kind, shape = tensor.tensor_type.name, [int(size) for size in tensor.shape[::-1]]
        data = torch.from_numpy(tensor.data.copy()).view(torch.uint8).flatten()
        if kind in _KINDS:
            value: QTensor | Tensor = decompress(data.view(shape[0], -1), kind)
        else:
            dtype = next(dtype for dtype, known in _DTYPES.items() if known == kind)
            value = data.view(dtype).view(shape)
        return rotary(value, name, self._reader, back=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read(directory: Path) -> tuple[Scheme, GgufWeights]:
    """The scheme and, lazily, the weights of a directory with one GGUF file; the inverse of :func:`write`.

    Raises:
        RequestError: there is no such file.
    """
    files = sorted(directory.glob("*.gguf"))
    if len(files) != 1:
        raise RequestError(f"A GGUF directory holds one file, got {len(files)} in {directory}: give another path.")
    kind = files[0].stem.rpartition("-")[2]
    if kind not in _KINDS:
        raise RequestError(f"A file is named after its blocks ({', '.join(_KINDS)}), got {files[0].name}: rename it.")
    return Scheme(_KINDS[kind].grid), GgufWeights(files[0])


def _add(writer: gguf.GGUFWriter, name: str, value: QTensor | Tensor, kind: Kind) -> None:
    if isinstance(value, QTensor):
        writer.add_tensor(name, compress(value, kind).numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
        return
    value = value.float() if value.ndim == 1 else value.contiguous()
    raw = value.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else value.numpy()
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[_DTYPES[value.dtype]])


def _bytes(kind: Kind) -> int:
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]


def _raw(half: Tensor) -> Tensor:
    """float16 (…) → its bytes (…, 2)."""
    return half.contiguous()[..., None].view(torch.uint8)


def _half(raw: Tensor) -> Tensor:
    """Bytes (…, 2) → float16 (…)."""
    return raw.contiguous().view(torch.float16).squeeze(-1)


def _nibbles(codes: Tensor) -> Tensor:
    """Codes (…, 32) → bytes (…, 16)."""
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return low | (high << 4)


def _codes(nibbles: Tensor) -> Tensor:
    """Bytes (…, 16) → codes (…, 32)."""
    return torch.cat([nibbles & 15, nibbles >> 4], -1)


def _pack_q4_1(numbers: Tensor, scale: Tensor, zero: Tensor) -> list[Tensor]:
    least = (-zero * scale.float()).half()  # (N, blocks)
    return [_raw(scale), _raw(least), _nibbles(numbers + zero[..., None])]


def _unpack_q4_1(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, least = _half(data[..., :2]), _half(data[..., 2:4])
    zero = (-least.float() / scale.float()).round().clamp(0, 15)
    if bool(((-zero * scale.float()).half() != least).any()):
        raise RequestError("A block's least value is a multiple of its scale here, got another: requantize the model.")
    return _codes(data[..., 4:]), scale, zero.to(torch.uint8)


def _unpack_symmetric(scale: Tensor, codes: Tensor, middle: int) -> tuple[Tensor, Tensor, Tensor]:
    return codes, scale, torch.full(scale.shape, middle, dtype=torch.uint8)


_KINDS: dict[str, _Blocks] = {
    "Q4_0": _Blocks(
        Grid(4, _SIZE, symmetric=True),
        3,
        4,
        lambda numbers, scale, zero: [_raw(scale), _nibbles(numbers + 8)],
        lambda data: _unpack_symmetric(_half(data[..., :2]), _codes(data[..., 2:]), 8),
    ),
    "Q4_1": _Blocks(Grid(4, _SIZE), 4, 4, _pack_q4_1, _unpack_q4_1),
    "Q8_0": _Blocks(
        Grid(8, _SIZE, symmetric=True),
        7,
        8,
        lambda numbers, scale, zero: [_raw(scale), numbers.to(torch.int8).view(torch.uint8)],
        lambda data: _unpack_symmetric(_half(data[..., :2]), data[..., 2:] ^ 128, 128),
    ),
}
