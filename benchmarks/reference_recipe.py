"""The published recipe's step, written plainly: what the other steps of benchmarks/calibration.py are compared with.

AffineQuant's weight-only setting with dense matrices behind both norms (``--use_ln_matrix``, arXiv 2403.12544 and its
released scripts): full matrices under a gradual mask, the head matrices as one full masked matrix too, each inverted by
``torch.linalg.inv`` in float32 whenever it is needed, four times a step; every weight transformed under float16
autocast and fake-quantized operation by operation; AdamW with a gradient scaler, and a look at the loss in every step.
It is kinder than the release in one thing: attention is the fused kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aq_lightning.models.sites import Heads
from aq_lightning.transforms.affine import gradual_mask

GROUP, LEVELS, STABILITY = 128, 2**4, 1e-2
BEHIND = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
VALUE, OUTPUT, DOWN = "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"


class ReferenceStep:
    """One optimizer step after another on one LLaMA block.

    Args:
        block: HF block in float32 on the GPU, frozen.
        arguments: its other arguments.
        heads: its attention heads.
    """

    def __init__(self, block: nn.Module, arguments: dict[str, object], heads: Heads) -> None:
        self.block, self.arguments, self.heads = block, arguments, heads
        like = block.self_attn.q_proj.weight
        hidden, values = like.shape[1], heads.key_value * heads.size
        self.matrices = {name: _leaf(torch.eye(hidden).to(like)) for name in BEHIND}
        self.values = _leaf(torch.eye(values).to(like))
        self.shifts = {name: _leaf(torch.zeros(hidden).to(like)) for name in BEHIND}
        self.mask = gradual_mask(hidden, hidden - 1, STABILITY, like)
        head = gradual_mask(heads.size, heads.size - 1, STABILITY, like)
        self.head_mask = torch.block_diag(*[head] * heads.key_value)  # (values, values)
        self.bounds = {
            name: [_leaf(torch.full((module.weight.numel() // GROUP, 1), 4.0).to(like)) for _ in range(2)]
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }
        self.inverses: dict[str, Tensor] = {}
        for name in BEHIND:  # the released norm multiplies its output by the inverse, at inference too
            block.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name: output @ self.inverses[name]
            )
        transforms = [*self.matrices.values(), self.values, *self.shifts.values()]
        bounds = [bound for pair in self.bounds.values() for bound in pair]
        groups = [{"params": transforms, "lr": 5e-3}, {"params": bounds, "lr": 1e-2}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.scaler = torch.amp.GradScaler("cuda")

    def __call__(self, hidden: Tensor, target: Tensor) -> float:
        """(batch, length, hidden) each; the loss."""
        with torch.autocast("cuda", torch.float16):
            output = functional_call(self.block, self.tensors(), (hidden,), self.arguments)
            output = output[0] if isinstance(output, tuple) else output
            loss = torch.nn.functional.mse_loss(output.float(), target.float())
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    def tensors(self) -> dict[str, Tensor]:
        """Transformed and fake-quantized weights, and the biases that shifts leave."""
        block = dict(self.block.named_parameters())
        weights, biases = {f"{DOWN}.weight": block[f"{DOWN}.weight"]}, {}
        for norm, linears in BEHIND.items():
            matrix = self.matrices[norm] * self.mask
            self.inverses[norm] = torch.linalg.inv(matrix)
            for name in linears:
                weights[f"{name}.weight"] = block[f"{name}.weight"] @ matrix.mT
                biases[f"{name}.bias"] = block[f"{name}.weight"] @ self.shifts[norm]
        values = self.values * self.head_mask
        weights[f"{VALUE}.weight"] = torch.linalg.inv(values).mT @ weights[f"{VALUE}.weight"]
        biases[f"{VALUE}.bias"] = biases[f"{VALUE}.bias"] @ torch.linalg.inv(values)
        weights[f"{OUTPUT}.weight"] = self._output(block[f"{OUTPUT}.weight"], values)
        rounded = {name: _fake_quantize(w, *self.bounds[name.removesuffix(".weight")]) for name, w in weights.items()}
        return rounded | biases

    def _output(self, weight: Tensor, values: Tensor) -> Tensor:
        """``W Aᵀ``; under grouped queries, which the release cannot do, a group reads its key-value head's block."""
        if weight.shape[1] == values.shape[0]:
            return weight @ values.mT
        size, heads = self.heads.size, self.heads.key_value
        blocks = torch.stack([values[i : i + size, i : i + size] for i in range(0, heads * size, size)])
        grouped = weight.unflatten(1, (heads, -1, size))  # (out, key-value heads, group, size)
        return torch.einsum("okgs,kts->okgt", grouped, blocks).flatten(1)


def _leaf(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor)


def _fake_quantize(weight: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """Operation by operation, on groups of the transformed weight."""
    groups = weight.reshape(-1, GROUP)  # (groups, size)
    high = torch.sigmoid(upper) * groups.amax(1, keepdim=True)
    low = torch.sigmoid(lower) * groups.amin(1, keepdim=True)
    scale = ((high - low) / (LEVELS - 1)).clamp(1e-5, 1e4)
    zero = (-low / scale).clamp(-1e4, 1e4).round()
    steps = groups / scale
    codes = (steps + (steps.round() - steps).detach() + zero).clamp(0, LEVELS - 1)
    return ((codes - zero) * scale).reshape(weight.shape)
