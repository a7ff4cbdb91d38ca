"""A model's tensors in safetensors files, read part by part under the names of its modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from aq_lightning.errors import RequestError
from aq_lightning.models.files import weight_map
from aq_lightning.models.naming import from_checkpoint, in_modules
from aq_lightning.models.sites import Architecture

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a model directory by name, each read from its file when asked for."""

    def __init__(self, directory: Path, stem: str = "model") -> None:
        """
        Raises:
            RequestError: the directory has no safetensors weights of that stem.
        """
        single, index = with_stem(SINGLE, stem), with_stem(INDEX, stem)
        if (directory / single).is_file():  # before the index, as transformers reads
            with safe_open(directory / single, framework="pt") as file:
                self._files: dict[str, Path] = dict.fromkeys(file.keys(), directory / single)
        elif (directory / index).is_file():
            self._files = weight_map(directory / index)
        else:
            raise RequestError(f"A model directory holds {single} or {index}, got {directory}: give another path.")

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def metadata(self, name: str) -> dict[str, str]:
        """Header of the file that holds tensor ``name``."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.metadata() or {}


class Weights:
    """The tensors of a checkpoint under the names of a model's modules, in the model's dtype, one part at a time.

    Args:
        stored: the checkpoint's tensors, read when asked for; perhaps the base model's, whose names lack a prefix.
        model: says which tensors there must be; on the meta device.
        architecture: says where the blocks are, and which names differ in checkpoints.

    Raises:
        RequestError: a tensor of the model is missing, or two that the model ties differ.
    """

    def __init__(self, stored: Mapping[str, Tensor], model: PreTrainedModel, architecture: Architecture) -> None:
        self._stored = stored
        self._dtype = model.dtype
        self._architecture = architecture
        self._wanted, tied = model.state_dict().keys(), model.all_tied_weights_keys
        self._prefixes = ("", f"{model.base_model_prefix}.")
        names = {
            self._module(self._rooted(name)): name for name in stored
        }  # of an expert's linears one, for they come together
        absent = sorted(self._wanted - names.keys() - tied.keys())
        if absent:
            raise RequestError(
                f"A checkpoint to read block by block holds every tensor of its model, got {absent[0]} missing"
                f"{f' and {len(absent) - 1} more' if len(absent) > 1 else ''}: check the architecture's names."
            )
        for target, source in tied.items():
            if target in names and not torch.equal(stored[names[target]], stored[names[source]]):
                raise RequestError(f"Tied tensors are equal, got others in {target} and {source}: untie them.")
        self._parts: dict[str, list[str]] = {}  # block's number, or nothing → names in the checkpoint
        root = f"{architecture.blocks}."
        for name in stored:
            module = self._module(self._rooted(name))
            if module in self._wanted:
                part = module.removeprefix(root).partition(".")[0] if module.startswith(root) else ""
                self._parts.setdefault(part, []).append(name)

    def block(self, index: int) -> dict[str, Tensor]:
        """A block's tensors by their names in the block, in memory of their own."""
        root = f"{self._architecture.blocks}.{index}."
        return {name.removeprefix(root): tensor for name, tensor in self._read(str(index)).items()}

    def outside(self) -> dict[str, Tensor]:
        """Tensors outside the blocks by their names in the model, in memory of their own."""
        return self._read("")

    def unknown(self) -> set[str]:
        """Tensors of the checkpoint that the model has not, by their names there."""
        return set(self._stored) - {name for part in self._parts.values() for name in part}

    def _rooted(self, name: str) -> str:
        """The name of a tensor in the checkpoint, from the model's root."""
        rooted = (prefix + name for prefix in self._prefixes)
        return next((each for each in rooted if self._module(each) in self._wanted), name)

    def _module(self, name: str) -> str:
        """The name in the model of a tensor in the checkpoint, both from the model's root."""
        return name if name in self._wanted else in_modules(name, self._architecture)

    def _read(self, part: str) -> dict[str, Tensor]:
        tensors = {self._rooted(name): self._stored[name] for name in self._parts[part]}
        own = {name: tensor for name, tensor in tensors.items() if name in self._wanted}
        others = {name: tensor for name, tensor in tensors.items() if name not in self._wanted}
        return {  # copies: otherwise the files stay mapped
            name: tensor.to(self._dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in (own | from_checkpoint(others, self._architecture)).items()
        }


def with_stem(file: str, stem: str) -> str:
    """The name of weights' files that begin with ``stem``."""
    return stem + file.removeprefix("model")
