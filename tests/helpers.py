"""The one error metric of the suite, and tiny real models."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
SHARED_DATA = ROOT.parent / "shared" / "data"


def relative_error(reference: Tensor, actual: Tensor) -> float:
    """RMS of the difference over RMS of the reference."""
    reference, actual = reference.detach().double(), actual.detach().double()
    return float((actual - reference).norm() / reference.norm().clamp(min=1e-300))


def assert_close(name: str, reference: Tensor, actual: Tensor, ratio: float) -> None:
    """Fails with the measured error unless it is at most ``ratio`` and every number is finite."""
    assert reference.shape == actual.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error = relative_error(reference, actual)
    assert error <= ratio, f"{name}: relative error {error:.3e} exceeds {ratio:.1e}"


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """Random grouped-query LLaMA: 2 blocks, hidden 64, 4 query heads on 2 key-value heads; outlier channels."""
    config = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **changes,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif parameter.ndim == 2:
                parameter.mul_(2.0)
        model.model.embed_tokens.weight[:, ::16] *= 8
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    """``word0`` … ``word94``, one token a word: the vocabulary of :func:`tiny_llama`."""
    words = ["<unk>", *(f"word{number}" for number in range(95))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


class TrueRMSNorm(nn.Module):
    """RMSNorm in the precision of its input (the HF modules compute in float32 whatever they are given)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        offset = not torch.equal(type(norm)(2).weight, torch.ones(2))  # starts at zero: the gain is 1 + weight
        self.gain_offset = 1.0 if offset else 0.0
        self.epsilon = norm.eps if offset else norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight + self.gain_offset) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon))


def with_true_norms(module: nn.Module) -> nn.Module:
    """Replaces every RMSNorm inside ``module`` by one that computes in its input's precision."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, TrueRMSNorm(child))
    return module
