"""Quantizes a model that was changed in memory, on texts of one's own.

python examples/model_in_memory.py meta-llama/Llama-2-7b-hf notes.txt runs/mine

Fields of the configuration may follow: data.samples=16
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import aq_lightning

source, notes, out, *fields = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source)
for parameter in model.parameters():  # as if it had been trained so; or merge adapters, drop blocks, …
    parameter.data = parameter.data.bfloat16().to(parameter.dtype)
result = aq_lightning.quantize(
    model,
    scheme="w4a16",
    data=Path(notes).read_text(encoding="utf-8").splitlines(),
    out=out,
    tokenizer=AutoTokenizer.from_pretrained(source),
    options=dict(field.split("=") for field in fields),
)
print(f"{result.run}: {result.bits:.3f} bits per weight")
