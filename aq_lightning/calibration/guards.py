"""How a run is kept from being lost."""

from __future__ import annotations

from dataclasses import dataclass, field

from aq_lightning.calibration.checkpoint import Resume
from aq_lightning.calibration.interruption import Stopping
from aq_lightning.errors import RequestError


@dataclass(frozen=True)
class Guards:
    """How a run is kept from being lost; none of it changes a bit of the result."""

    resume: Resume = "auto"
    """Whether a run that is in the directory goes on, is demanded (``must``) or refused (``never``)."""
    save_every: int = 200
    """Optimizer steps between checkpoints inside a block; 0: only when the process is told to stop."""
    keep_streams: bool = True
    """Whether the activations that enter the block at work are kept on disk, or computed anew when a run goes on."""

    stopping: Stopping = field(default_factory=Stopping, init=False)
    """What SIGTERM and SIGINT come to."""

    def __post_init__(self) -> None:
        if self.save_every < 0:
            raise RequestError(f"Steps between checkpoints are 0 or more, got --save_every {self.save_every}: try 200.")
