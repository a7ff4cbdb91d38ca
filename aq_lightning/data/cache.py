"""Tensors that are slow to compute, kept on disk under a name that says what they depend on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_NAME = "tensor"
_DIGEST = "sha256"


def cache_directory(configured: str | None) -> Path:
    """``configured``, else ``$AQ_LIGHTNING_CACHE``, else ``~/.cache/aq_lightning``."""
    return Path(configured or os.environ.get("AQ_LIGHTNING_CACHE") or "~/.cache/aq_lightning").expanduser()


def cached(key_parts: Mapping[str, str | int], directory: Path, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()``, or what it returned before for the same key.

    Args:
        key_parts: everything that the tensor depends on, by name; a change of any part is another file.
        directory: where the files are. One that cannot be written is warned of once, and nothing is kept.
        compute: called only where there is no file, or one that is damaged.
    """
    key = json.dumps(dict(key_parts), sort_keys=True)
    path = directory / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    kept = _load(path)
    if kept is not None:
        return kept
    tensor = compute().contiguous()
    try:
        _store(tensor, path)
    except OSError as error:
        _warn_unwritable(directory, error.strerror or str(error))
    return tensor


def _digest(tensor: Tensor) -> str:
    content = f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def _load(path: Path) -> Tensor | None:
    """The tensor of an undamaged file, else None."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(_NAME)
            intact = (file.metadata() or {}).get(_DIGEST) == _digest(tensor)
    except (OSError, SafetensorError):
        return None
    # A clone, because the file's pages may be truncated under a tensor that maps them.
    return tensor.clone() if intact else None


def _store(tensor: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final name, so that a reader sees the old file, the new one, or none.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_bytes(save({_NAME: tensor}, metadata={_DIGEST: _digest(tensor)}))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@functools.cache
def _warn_unwritable(directory: Path, reason: str) -> None:
    warnings.warn(
        f"The cache {str(directory)!r} cannot be written ({reason}), so windows are computed anew in each run: "
        "set AQ_LIGHTNING_CACHE or data.cache_dir to a writable directory.",
        stacklevel=3,
    )
