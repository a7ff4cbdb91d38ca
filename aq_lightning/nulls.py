"""Nulls and empty lists in a configuration, which the parser lets pass everywhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace

from aq_lightning.errors import RequestError


def refuse_nulls(owner: Callable[..., object], values: Mapping[str, Any], section: str) -> None:
    """Checks what a constructor is to be given, and what dataclasses among it are.

    Args:
        owner: class or function that takes the values.
        values: by parameter.
        section: where they stand in the configuration, with a dot at its end; may be empty.

    Raises:
        RequestError: a null where the annotation has none, or no fields where it has a dataclass.
    """
    function = owner.__init__ if inspect.isclass(owner) else owner
    for name, hint in get_type_hints(function).items():
        if name not in values or name == "return":
            continue
        value, kinds = values[name], get_args(hint) or (hint,)
        if value is None and NoneType not in kinds:
            raise RequestError(f"{section}{name} cannot be null: leave it out for its default, or give a value.")
        kind = next((kind for kind in kinds if inspect.isclass(kind) and is_dataclass(kind)), None)
        if kind is None or value is None or isinstance(value, (str, kind)):
            continue
        if not isinstance(value, Namespace):
            raise RequestError(f"{section}{name} is a mapping of fields, got {value!r}: name its fields.")
        refuse_nulls(kind, vars(value), f"{section}{name}.")
