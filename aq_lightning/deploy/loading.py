"""Opening any model to be put to work."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from aq_lightning.deploy.fused import fuse
from aq_lightning.deploy.linear import Int4Linear
from aq_lightning.deploy.quantizer import enabled
from aq_lightning.models.loading import load_config, load_model, load_tokenizer, locate, reading, storage_of


def load(
    pretrained: str, device: torch.device, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model on a device, and its tokenizer: packed if it is quantized, its linears joined.

    On a CPU it computes in float32, with weights expanded; on a GPU as it is stored, in float16 if that is float32.

    Args:
        pretrained: directory, hub id or ``embedded``.
        device: where it shall run.
        trust_remote_code: whether code from the hub may run.

    Raises:
        RequestError: the model cannot be found or read, or not be run packed.
    """
    source = locate(pretrained)
    config = load_config(source, trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code)
    stored = storage_of(source, config)
    gpu = torch.float16 if stored == torch.float32 else stored
    dtype = torch.float32 if device.type == "cpu" else gpu
    if source.gguf_file is not None or getattr(config, "quantization_config", None) is None:
        return load_model(source, dtype, trust_remote_code).to(device), tokenizer
    with reading(source), enabled():
        model = AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    model = fuse(model.eval().requires_grad_(False))
    for module in model.modules() if device.type == "cpu" else ():
        if isinstance(module, Int4Linear):
            module.expand()
    return model, tokenizer
