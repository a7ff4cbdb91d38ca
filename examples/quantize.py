"""Quantizes a model's directory or hub id and answers a prompt with the result.

python examples/quantize.py meta-llama/Llama-2-7b-hf wikitext2 runs/llama-2-7b

Fields of the configuration may follow: trainer.max_epochs=10 data.samples=64
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import aq_lightning

model, data, out, *fields = sys.argv[1:]
options = dict(field.split("=") for field in fields)
result = aq_lightning.quantize(model, scheme="w4a16g32", data=data, out=out, options=options)
print(f"{result.checkpoint}: perplexity {result.perplexity:.2f} at {result.bits:.3f} bits per weight")

quantized = AutoModelForCausalLM.from_pretrained(result.checkpoint)
tokenizer = AutoTokenizer.from_pretrained(result.checkpoint)
prompt = tokenizer("The word of the day is", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(quantized.generate(**prompt, max_new_tokens=8)[0]))
