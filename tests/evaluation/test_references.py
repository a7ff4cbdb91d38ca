"""bitsandbytes' formats stand in for the linears only while they are scored."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error, tiny_llama
from torch import nn

from aq_lightning.errors import RequestError
from aq_lightning.evaluation import references
from aq_lightning.evaluation.references import check_reference, reference_bits, replaced

CPU = torch.device("cpu")
NF4 = torch.tensor(  # QLoRA's appendix E
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


@torch.no_grad()
def test_nf4_rounds_to_its_quantiles() -> None:
    linear, x = nn.Linear(128, 32), torch.randn(5, 128)
    blocks = linear.weight.reshape(-1, 64)
    reach = blocks.abs().amax(1, keepdim=True)
    nearest = NF4[(blocks[..., None] / reach[..., None] - NF4).abs().argmin(-1)] * reach
    expected = x @ nearest.view(32, 128).T + linear.bias
    holder = nn.Sequential(linear)
    with replaced([holder], "nf4", CPU):
        assert relative_error(expected, holder(x)) < 1e-5
    assert holder[0] is linear and reference_bits([linear], "nf4") == 4 + 32 / 64 + 32 / 128


@torch.no_grad()
def test_int8_keeps_outlier_channels() -> None:
    linear, x = nn.Linear(128, 32, bias=False), torch.randn(5, 128).clamp(-3, 3)
    x[:, 7] = 100.0
    scale = linear.weight.abs().amax(1, keepdim=True) / 127
    weight = (linear.weight / scale).round() * scale
    holder = nn.Sequential(linear)
    with replaced([holder], "int8", CPU):
        answer = holder(x)
    coarse = x.abs().amax(1, keepdim=True) / 127  # what one scale for all channels would be
    assert relative_error(x @ linear.weight.T, answer) < 0.02
    assert relative_error(x @ linear.weight.T, (x / coarse).round() * coarse @ weight.T) > 3 * relative_error(
        x @ linear.weight.T, answer
    )
    assert reference_bits([linear], "int8") == 8 + 32 / 128


def test_linears_return_after_a_crash() -> None:
    model = tiny_llama()
    before = dict(model.named_modules())
    with pytest.raises(KeyboardInterrupt), replaced(model.model.layers, "nf4", CPU):
        assert type(model.model.layers[1].mlp.up_proj).__name__ == "Linear4bit"
        raise KeyboardInterrupt
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in before.items())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_device_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    check_reference(kind, CPU)

    def broken(*_: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(references, "_converted", broken)
    with pytest.raises(RequestError, match=f"got {kind} on cpu, where bitsandbytes fails .no kernel."):
        check_reference(kind, CPU)
