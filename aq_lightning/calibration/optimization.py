"""What steps with what: the optimizer of a window's parameters, and how its step sizes fall."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from torch.optim import Optimizer, lr_scheduler

from aq_lightning.calibration.attach import AttachedBlock
from aq_lightning.recipe import Recipe

OFFSET = ".offset"
"""End of the names of learned rounding's parameters."""

_DECAYS = {
    "cosine": lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
    "linear": lambda optimizer, steps: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps),
}


def optimization(
    blocks: Iterable[AttachedBlock], recipe: Recipe, slowdown: float, steps: Callable[[], float]
) -> object:
    """What :meth:`LightningModule.configure_optimizers` returns.

    Args:
        blocks: whose transforms and quantizers are trained.
        recipe: optimizer, step sizes by kind of parameter, decay.
        slowdown: factor on every step size.
        steps: counts those of the whole training.
    """
    groups = []
    for block in blocks:
        offsets = [each.offset for each in block.quantizers.values() if each.offset is not None]
        ranges = [each for name, each in block.quantizers.named_parameters() if not name.endswith(OFFSET)]
        factors = [factor for transform in block.transforms.values() for factor in transform.factors]
        clips = [each for factor in factors if factor.rounds for each in factor.parameters() if each.requires_grad]
        maps = [each for factor in factors if not factor.rounds for each in factor.parameters()]
        kinds = {"transform": maps, "clipping": [*ranges, *clips], "rounding": offsets}
        groups += [{"params": kinds[kind], "lr": getattr(recipe.learning_rates, kind) * slowdown} for kind in kinds]
    optimizer = recipe.optimizer([group for group in groups if group["params"]])
    return optimizer if recipe.decay == "none" else scheduled(optimizer, recipe.decay, int(steps()))


def scheduled(optimizer: Optimizer, decay: Literal["cosine", "linear"], steps: int) -> dict[str, object]:
    """An optimizer whose step sizes fall to 0 over so many steps, as Lightning takes it."""
    scheduler = _DECAYS[decay](optimizer, steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
