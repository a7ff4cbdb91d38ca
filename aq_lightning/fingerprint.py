"""What a run's bytes depend on besides its configuration."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from aq_lightning import distributed
from aq_lightning.calibration import WORLD
from aq_lightning.errors import RequestError
from aq_lightning.models.loading import Source

_PACKAGES = ("torch", "lightning", "transformers", "safetensors", "aq-lightning")
_PIECES = 64  # of a large file
_PIECE = 2**14  # bytes


def fingerprint(source: Source, revision: str | None, tokens: Mapping[str, Tensor], device: str) -> dict[str, str]:
    """Names of everything that decides a run's bytes, with short digests.

    Args:
        source: the model.
        revision: of a model from the hub.
        tokens: windows by split, int64 (windows, length).
        device: kind of device that computes, ``cpu`` or ``cuda``.
    """
    return {
        **_model(source, revision),
        **{f"{split} tokens": _tokens(windows) for split, windows in tokens.items()},
        **{package: _version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "device": device,
        WORLD: str(distributed.ranks()),
    }


def check_alike(identity: Mapping[str, str]) -> None:
    """
    Raises:
        RequestError: this process has another fingerprint than the leading one.
    """
    first = distributed.from_first(identity)
    different = [f"{name}: {first.get(name)} → {value}" for name, value in identity.items() if first.get(name) != value]
    if different:
        raise RequestError(
            f"All processes have the same model, text and versions, got others in process {distributed.rank()} "
            f"({'; '.join(different)}): give every node the same files and environment."
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # this package itself, run from its directory
        return "not installed"


def _model(source: Source, revision: str | None) -> dict[str, str]:
    directory = Path(source.location).expanduser()
    if not directory.is_dir():
        return {"model": f"{source.location} @ {revision}"}
    if source.gguf_file:
        return {f"model {source.gguf_file}": _sampled(directory / source.gguf_file)}
    names = sorted(path.name for pattern in ("*.safetensors", "*.json") for path in directory.glob(pattern))
    return {f"model {name}": _sampled(directory / name) for name in names}


def _sampled(path: Path) -> str:
    """Size and digest of a file: all of a small one, and of a large one 64 pieces from its header to its end."""
    size = path.stat().st_size
    sha = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _PIECES * _PIECE:
            sha.update(file.read())
        else:
            for number in range(_PIECES):
                file.seek(number * (size - _PIECE) // (_PIECES - 1))
                sha.update(file.read(_PIECE))
    return f"{size} bytes, sha256 {sha.hexdigest()[:16]}"


def _tokens(windows: Tensor) -> str:
    sha = hashlib.sha256(windows.contiguous().numpy().tobytes())
    return f"{' × '.join(map(str, windows.shape))}, sha256 {sha.hexdigest()[:16]}"
