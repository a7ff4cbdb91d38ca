"""The model card that travels with a checkpoint: what was done, what it costs, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aq_lightning.durable import write_text
from aq_lightning.errors import RequestError

CARD = "README.md"
_VLLM, _SGLANG = "vllm serve {directory}", "python -m sglang.launch_server --model-path {directory}"
_TRANSFORMERS = 'AutoModelForCausalLM.from_pretrained("{directory}")'
_ENGINES = {
    "compressed-tensors": {"vLLM": _VLLM, "SGLang": _SGLANG, "transformers": _TRANSFORMERS},
    "gptq": {"vLLM": _VLLM, "SGLang": _SGLANG, "transformers": _TRANSFORMERS},
    "gptq_v2": {"transformers": _TRANSFORMERS},
    "awq": {"vLLM": _VLLM, "SGLang": _SGLANG, "transformers": _TRANSFORMERS},
    "dense": {"vLLM": _VLLM, "SGLang": _SGLANG, "transformers": _TRANSFORMERS},
    "gguf": {
        "llama.cpp": "llama-server -m {directory}/{file}",
        "transformers": 'AutoModelForCausalLM.from_pretrained("{directory}", gguf_file="{file}")',
    },
    "aq_lightning": {"aq_lightning": "python train.py test --model.pretrained {directory}"},
}
"""Format, or method of checkpoints that only this package runs → engine → how to load it."""


@dataclass(frozen=True)
class Facts:
    """What a card says."""

    source: str
    """The model that was quantized: a hub id, or a path, of which only the last part is said."""
    scheme: str
    """Its integers, as recipes name them."""
    form: str
    """The format's name; the method's, if only this package runs it."""
    parity: str
    """What the check of the directory has seen."""
    rows: Sequence[Mapping[str, Any]] = ()
    """The run's final table, the method last; empty if it was not made."""
    file: str = ""
    """The file to name, in formats of one file."""


def card(facts: Facts, directory: str) -> str:
    """Markdown with the header that the hub reads.

    Args:
        facts: what it says.
        directory: name of the checkpoint, for the commands.
    """
    method = facts.rows[-1]["model"] if facts.rows else "aq_lightning"
    local = Path(facts.source).expanduser().exists()
    source = Path(facts.source).name if local else facts.source
    header = ["---", *([] if local else [f"base_model: {source}"]), "pipeline_tag: text-generation"]
    header += ["tags:", "- quantized", f"- {facts.form}", "---"]
    text = [
        f"# {source}, {facts.scheme}, {facts.form}",
        f"{source} quantized to `{facts.scheme}` by {method} with aq_lightning. Format: {facts.form}.",
        *_table(facts.rows),
        f"Checked when it was written: {facts.parity}.",
        "## Loading",
        "\n".join(f"- {engine}: `{line}`" for engine, line in _loading(facts, directory).items()),
    ]
    return "\n".join(header) + "\n\n" + "\n\n".join(text) + "\n"


def write_card(directory: Path, facts: Facts, name: str) -> None:
    """Puts the card into a directory, whole or not at all.

    Args:
        directory: of the checkpoint.
        facts: what it says.
        name: of the directory when it is done, for the commands.

    Raises:
        RequestError: there is no such directory.
    """
    if not directory.is_dir():
        raise RequestError(f"A card lies in a checkpoint, got {directory}, which does not exist: export first.")
    write_text(directory / CARD, card(facts, name))


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["| model | perplexity | bits per weight |", "|---|---:|---:|"]
    lines += [f"| {row['model']} | {row['perplexity']:.4g} | {row['bits']:.3f} |" for row in rows]
    return ["\n".join(lines)]


def _loading(facts: Facts, directory: str) -> dict[str, str]:
    """Engine → command; which engine takes which scheme is in docs/deploy.md."""
    engines = _ENGINES["gguf" if facts.file else facts.form]
    return {engine: line.format(directory=directory, file=facts.file) for engine, line in engines.items()}
