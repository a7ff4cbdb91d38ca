"""The configurations that come with the package."""

from __future__ import annotations

from pathlib import Path

from aq_lightning.errors import RequestError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""One YAML per method."""


def method_file(name: str | Path) -> Path:
    """The file of a method: a path, or the name of one that comes with the package.

    Raises:
        RequestError: there is neither.
    """
    places = (Path(name), CONFIGS.parent / name, CONFIGS / f"{name}.yaml")
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        raise RequestError(f"A method is a YAML file or one of {known}, got {str(name)!r}: name one of these.")
    return found


def with_files(arguments: list[str]) -> list[str]:
    """Arguments of a command line in which every ``--config`` names a file.

    Raises:
        RequestError: see :func:`method_file`.
    """
    found, before = [], ""
    for each in arguments:
        if before == "--config":
            each = str(method_file(each))
        elif each.startswith("--config="):
            each = f"--config={method_file(each.partition('=')[2])}"
        found.append(each)
        before = each
    return found
