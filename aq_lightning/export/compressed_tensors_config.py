"""The ``quantization_config`` of a compressed-tensors checkpoint, and the scheme it describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aq_lightning.errors import RequestError
from aq_lightning.scheme import Grid, Scheme

PACKED = "pack-quantized"
INTEGERS = "int-quantized"
METHOD = "aq_lightning"
"""``quant_method`` of checkpoints that only this package runs."""

# Keys whose value must be the one given; the clients' parsers accept no key that is not in these tables.
_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
}
_GROUP: dict[str, Any] = {"output_activations": None}
_ARGUMENTS: dict[str, Any] = {"type": "int", "block_structure": None, "actorder": None}
# Written by some tools even if unused, and then empty.
_OFTEN_EMPTY = ("transform_config", "sparsity_config")
# Keys that do not bear on the stored numbers.
_CONFIG_NOTES = {"global_compression_ratio", "ignore", "version", "run_compressed"}
_ARGUMENT_NOTES = {"observer", "observer_kwargs", "zp_dtype"}


def format_of(scheme: Scheme) -> str:
    """How weights are stored: as plain int8 where engines multiply them so (8 bits on both sides, symmetric, one scale
    per output channel), packed otherwise."""
    both = scheme.activation is not None and scheme.activation.bits == 8
    return INTEGERS if both and scheme.weight == Grid(8, None, symmetric=True) else PACKED


def quantization_config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """The dictionary for ``config.json``; the inverse of :func:`scheme_of`.

    Every ``torch.nn.Linear`` not in ``ignore`` is declared quantized, by module path or ``re:`` pattern. The format is
    named for the group too: clients would otherwise infer another one for quantized activations.
    """
    weight, activation = scheme.weight, scheme.activation
    strategy = "channel" if weight.group_size is None else "group"
    group = _GROUP | {
        "format": format_of(scheme),
        "targets": ["Linear"],
        "weights": _arguments(weight, strategy, dynamic=False, observer="minmax"),
        "input_activations": None if activation is None else _arguments(activation, "token", dynamic=True),
    }
    return _CONFIG | {
        "format": format_of(scheme),
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "config_groups": {"group_0": group},
    }


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a ``quantization_config``; the inverse of :func:`quantization_config`.

    Raises:
        RequestError: the configuration holds anything that a :class:`Scheme` cannot say; the message names it.
    """
    used = {key: value for key, value in config.items() if value or key not in _OFTEN_EMPTY}
    form = used.get("format")
    if form not in (PACKED, INTEGERS):
        raise RequestError(f"quantization_config.format must be {PACKED!r} or {INTEGERS!r}, got {form!r}: no other is "
                           "supported.")  # fmt: skip
    _expect("quantization_config", dict.fromkeys(_CONFIG) | used, _CONFIG, _CONFIG_NOTES | {"config_groups", "format"})
    groups = used.get("config_groups") or {}
    if len(groups) != 1:
        raise RequestError(f"A checkpoint has 1 config group, got {sorted(groups)}: quantize all linears alike.")
    (name, group), *_ = groups.items()
    if not isinstance(group, Mapping):
        raise RequestError(f"A config group is spelled out, got {name}: {group!r}: write out the preset's arguments.")
    named = {key: value for key, value in group.items() if (key, value) != ("format", None)}
    _expect(name, named, _GROUP | {"format": form}, {"targets", "weights", "input_activations"})
    inputs = group.get("input_activations")
    scheme = Scheme(
        weight=_grid(f"{name}.weights", group.get("weights") or {}, ("group", "channel"), dynamic=False),
        activation=None if inputs is None else _grid(f"{name}.input_activations", inputs, ("token",), dynamic=True),
    )
    if form == INTEGERS and format_of(scheme) != INTEGERS:
        raise RequestError(f"{INTEGERS} is read for w8a8sym, got {scheme}: write it as {PACKED}.")
    return scheme


def own_config(config: Mapping[str, Any], modules: Sequence[str], scheme: Scheme) -> dict[str, Any]:
    """A ``quantization_config`` for a model whose ``modules`` carry online products, or whose keys and values have a
    grid: another method's, for no client of compressed-tensors can run them; the inverse of :func:`split_config`."""
    own: dict[str, Any] = {"quant_method": METHOD, "compressed_tensors": config, "online": list(modules)}
    if scheme.key_value is not None:
        own["key_value"] = {"bits": scheme.key_value.bits, "group_size": scheme.key_value.group_size}
        own["key_value"] |= {"static": True} if scheme.static_cache else {}
    return own


def split_config(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str], dict[str, Any]]:
    """The section of compressed-tensors in a ``quantization_config``, the modules that carry online products, and what
    the scheme says of keys and values, by fields of :class:`Scheme`."""
    if config.get("quant_method") != METHOD:
        return config, [], {}
    _expect("quantization_config", config, {"quant_method": METHOD}, {"compressed_tensors", "online", "key_value"})
    return config["compressed_tensors"], config["online"], _cache(config.get("key_value"))


def _cache(fields: object) -> dict[str, Any]:
    if fields is None:
        return {}
    known = isinstance(fields, Mapping) and set(fields) - {"static"} == {"bits", "group_size"}
    if not known or not all(isinstance(each, int) for each in fields.values() if each is not None):
        raise RequestError(
            f"quantization_config.key_value holds bits and group_size, whole numbers, got {fields!r}: write it again."
        )
    return {"key_value": Grid(fields["bits"] or 0, fields["group_size"]), "static_cache": bool(fields.get("static"))}


def _arguments(grid: Grid, strategy: str, *, dynamic: bool, observer: str | None = None) -> dict[str, Any]:
    return _ARGUMENTS | {
        "num_bits": grid.bits,
        "symmetric": grid.symmetric,
        "strategy": strategy,
        "group_size": grid.group_size,
        "dynamic": dynamic,
        "observer": observer,
        "observer_kwargs": {},
    }


def _grid(where: str, arguments: Mapping[str, Any], strategies: tuple[str, ...], *, dynamic: bool) -> Grid:
    arguments = {"dynamic": False, "symmetric": True} | dict(arguments)
    own = {"num_bits", "symmetric", "strategy", "group_size"}
    _expect(where, arguments, _ARGUMENTS | {"dynamic": dynamic, "scale_dtype": None}, _ARGUMENT_NOTES | own)
    strategy, size = arguments.get("strategy"), arguments.get("group_size")
    if strategy not in strategies:
        raise RequestError(f"{where}.strategy is {' or '.join(strategies)}, got {strategy!r}: requantize the model.")
    if (strategy == "group") != (size not in (None, -1)):
        raise RequestError(f"{where}.group_size goes with strategy 'group', got {size!r} with {strategy!r}.")
    return Grid(arguments.get("num_bits", 8), size if strategy == "group" else None, arguments["symmetric"])


def _expect(where: str, received: Mapping[str, Any], values: Mapping[str, Any], free: set[str]) -> None:
    """Refuses unknown keys and values other than the expected ones; a key that is absent has its expected value."""
    unknown = sorted(received.keys() - values.keys() - free)
    if unknown:
        raise RequestError(f"{where} must hold only keys that are understood here, got {unknown}: remove them.")
    for key, value in values.items():
        if received.get(key, value) != value:
            raise RequestError(f"{where}.{key} must be {value!r}, got {received[key]!r}: no other is supported.")
