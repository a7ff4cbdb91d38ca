"""Three methods on one model, side by side on one page.

python examples/compare_methods.py meta-llama/Llama-2-7b-hf wikitext2 runs/compared

Fields of the configurations may follow: data.samples=64
"""

import sys
from pathlib import Path

import aq_lightning
from aq_lightning.report import Record, page

model, data, out, *fields = sys.argv[1:]
options = dict(field.split("=") for field in fields)
runs = {}
for method in ("rtn", "gptq", "affinequant"):
    place = f"{out}/{method}"
    runs[method] = aq_lightning.quantize(model, "w3a16g32", data, place, method, options=options)
for method, result in runs.items():
    print(f"{method:<12} {result.perplexity:10.2f}")
Path(out, "compared.html").write_text(page([Record(result.run) for result in runs.values()]), encoding="utf-8")
