"""Whether a model fits where it is to compute."""

from __future__ import annotations

import psutil
import torch
from torch import nn


def fits(model: nn.Module, device: torch.device) -> bool:
    """Whether the parameters, which may be on the meta device, fit in float32 and leave half of what is free for
    activations."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what calibration held counts as free
        free, _ = torch.cuda.mem_get_info(device)  # bytes
    else:
        free = psutil.virtual_memory().available
    return 4 * sum(parameter.numel() for parameter in model.parameters()) <= free / 2
