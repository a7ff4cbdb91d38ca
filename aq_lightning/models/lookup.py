"""From a model's configuration to the data of its architecture."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from transformers import PreTrainedConfig

from aq_lightning.errors import RequestError
from aq_lightning.models.sites import Architecture, Heads


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The data of a model's architecture: file ``models/<model_type>.py``, constant ``SPEC``.

    Where ``SPEC`` is a tuple of variants, the first whose requirements the configuration meets.

    Raises:
        RequestError: no such file, or a configuration that the file does not cover.
    """
    variants = variants_of(config.model_type)
    unmet = [
        [field for field, values in variant.requires.items() if getattr(config, field, None) not in values]
        for variant in variants
    ]
    nearest = min(range(len(variants)), key=lambda index: len(unmet[index]))
    if unmet[nearest]:
        field = unmet[nearest][0]
        values = " or ".join(f"{value!r}" for value in variants[nearest].requires[field])
        raise RequestError(
            f"A {config.model_type} model must have {field} = {values} for its sites to be exact, "
            f"got {getattr(config, field, None)!r}: another layout needs its own variant in "
            f"aq_lightning/models/{config.model_type}.py."
        )
    return variants[nearest]


def variants_of(model_type: str) -> tuple[Architecture, ...]:
    """All that ``models/<model_type>.py`` knows of a model type.

    Raises:
        RequestError: no such file.
    """
    known = model_types()
    if model_type not in known:
        raise RequestError(
            f"The model's architecture must be one of {', '.join(known)}, got {model_type!r}: a new one needs one file "
            f"aq_lightning/models/{model_type}.py with a constant SPEC = Architecture(blocks=…, sites=…) that names "
            "the list of blocks and, for each site, its producer, consumers and what folds there "
            "(docs/adding-an-architecture.md)."
        )
    spec = importlib.import_module(f"aq_lightning.models.{model_type}").SPEC
    return spec if isinstance(spec, tuple) else (spec,)


def model_types() -> list[str]:
    """Model types with a file of data."""
    here = Path(__file__).parent
    return sorted(path.stem for path in here.glob("*.py") if re.search(r"^SPEC = ", path.read_text("utf-8"), re.M))


def heads_of(config: PreTrainedConfig, architecture: Architecture) -> Heads:
    """Attention heads of a model, from the fields of its configuration that its architecture names."""
    query = getattr(config, architecture.heads)
    counted = architecture.key_value_heads
    key_value = counted if isinstance(counted, int) else getattr(config, counted)
    size = getattr(config, "head_dim", None) or config.hidden_size // query
    turned = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    return Heads(query, key_value, size, int(size * turned))
