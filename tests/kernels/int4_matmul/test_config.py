"""Tables of block sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from aq_lightning.kernels.int4_matmul import config
from aq_lightning.kernels.int4_matmul.config import read, save, shared

SHIPPED = sorted((Path(config.__file__).parent / "tuned").glob("*.json"))


def test_there_is_a_table_for_hopper() -> None:
    assert "sm90" in {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_fit_the_gpu_and_read_back(path: Path, tmp_path: Path) -> None:
    entries = read(path)
    assert len(dict(entries)) == len(entries)
    for product, chosen in entries:
        assert chosen.dequantize or shared(chosen, product) <= 227 * 1024
    save(entries, tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_text() == path.read_text()
