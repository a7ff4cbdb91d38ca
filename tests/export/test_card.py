"""The card says what was done, and names only engines that load the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from aq_lightning.errors import RequestError
from aq_lightning.export.card import Facts, card, write_card

ROWS = [
    {"model": "full precision", "perplexity": 5.4721, "bits": 16.0},
    {"model": "affinequant", "perplexity": 5.6, "bits": 4.156},
]


def test_a_card_of_a_hub_model() -> None:
    text = card(Facts("meta/model-7b", "w4a16g128", "awq", "290 tensors", ROWS), "out")
    assert text.startswith(
        "---\nbase_model: meta/model-7b\npipeline_tag: text-generation\ntags:\n- quantized\n- awq\n---"
    )
    assert "| affinequant | 5.6 | 4.156 |" in text and "by affinequant with aq_lightning" in text
    assert "- vLLM: `vllm serve out`" in text and "290 tensors." in text


@pytest.mark.parametrize("form, file, engines", [
    ("gptq_v2", "", ["transformers"]),
    ("gguf-q4_0", "model-Q4_0.gguf", ["llama.cpp", "transformers"]),
    ("aq_lightning", "", ["aq_lightning"]),
])  # fmt: skip
def test_engines(form: str, file: str, engines: list[str]) -> None:
    text = card(Facts("meta/model-7b", "w4a16", form, "checked", file=file), "out")
    found = [line[2:].partition(":")[0] for line in text.partition("## Loading")[2].splitlines() if line]
    assert found == engines and "| model |" not in text and file in text


def test_the_name_of_a_directory_is_all_that_is_said_of_it(tmp_path: Path) -> None:
    text = card(Facts(str(tmp_path), "w4a16", "dense", "checked"), "out")
    assert f"# {tmp_path.name}, w4a16, dense" in text and "base_model" not in text and str(tmp_path.parent) not in text


def test_a_card_lies_in_a_checkpoint(tmp_path: Path) -> None:
    facts = Facts("meta/model-7b", "w4a16", "dense", "checked")
    write_card(tmp_path, facts, "done")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert "vllm serve done`" in (tmp_path / "README.md").read_text()
    with pytest.raises(RequestError, match="does not exist: export first"):
        write_card(tmp_path / "absent", facts, "done")
