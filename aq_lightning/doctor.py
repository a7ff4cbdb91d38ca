"""What folds in a user's own model, and that it is exact there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from aq_lightning.calibration import attach, capture, merge
from aq_lightning.calibration.call import BlockFunction, answer
from aq_lightning.errors import RequestError
from aq_lightning.models.loading import Pretrained
from aq_lightning.models.sites import Site
from aq_lightning.recipe import StreamStorage
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import Affine, Factor

_TOLERANCE = 1e-10  # relative, of float64 arithmetic
_SAMPLES, _LENGTH = 2, 16  # windows and tokens of the measurement


@dataclass(frozen=True)
class Finding:
    """One factor at one site."""

    site: Site
    factor: type[Factor]
    error: float
    """Relative change of the block's output, the greater of before and after merge; infinite where refused."""
    refusal: str = ""
    """Why this model cannot take the factor, although the site absorbs its kind."""

    def __str__(self) -> str:
        ends = f"{self.site.producer} → {', '.join(self.site.consumers) or self.site.dual}"
        verdict = self.refusal or f"{self.error:.1e} {'exact' if self.exact else 'NOT EXACT'}"
        return f"{self.site.name:<16} {self.factor.__name__:<10} {verdict}  ({ends})"

    @property
    def exact(self) -> bool:
        """Whether the block answers as before."""
        return self.error <= _TOLERANCE


@torch.no_grad()
def examine(pretrained: Pretrained) -> Iterator[Finding]:
    """Measures every factor at every site that absorbs its kind, on the first block."""
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(pretrained.model.config.vocab_size, (_SAMPLES, _LENGTH), generator=generator)
    with _TrueFloat64():
        storage = StreamStorage("float32", "host")  # float64 here
        hidden, arguments = capture(pretrained.shell(), windows, storage, torch.device("cpu"))
        block = pretrained.block(0).double()
        reference = answer(block, hidden, arguments[0])  # (samples, length, hidden)
        for site in pretrained.architecture.sites:
            for factor in (kind for kind in Factor.__subclasses__() if kind.group in site.absorbs):
                yield _measure(pretrained, site, factor, lambda of: _error(reference, answer(of, hidden, arguments[0])))


def _measure(
    pretrained: Pretrained, site: Site, factor: type[Factor], error: Callable[[BlockFunction], float]
) -> Finding:
    """One factor with random parameters, far from the identity, before and after merge into a copy of the block."""
    block = pretrained.block(0).double()
    scheme = Scheme.parse("w4a4")  # where a producer can subtract a shift, it does
    try:
        attached = attach(
            block, pretrained.architecture, pretrained.heads, {site.name: [factor]}, None, scheme, torch.float64
        )
    except RequestError as refusal:
        return Finding(site, factor, math.inf, str(refusal))
    generator = torch.Generator().manual_seed(0)
    for parameter in attached.transforms.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter += 0.3 * noise / (1 if parameter.ndim < 3 else parameter.shape[-1] ** 0.5)
    for part in attached.modules():
        if isinstance(part, Affine):
            part.open_band(0, 1)
    before = error(attached)
    merge(attached, torch.float64)
    return Finding(site, factor, max(before, error(block)))


def _error(reference: Tensor, output: Tensor) -> float:
    """RMS of the difference over RMS of the reference; infinite if anything is not finite."""
    ratio = float((output - reference).norm() / reference.norm())
    return ratio if math.isfinite(ratio) else math.inf


class _TrueFloat64(TorchFunctionMode):
    """Computes in float64 what HF modules compute in float32 whatever they are given: norms, softmax, rotary tables."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(value: object) -> object:
            return torch.float64 if value is torch.float32 else value

        func = Tensor.double if func is Tensor.float else func
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})
