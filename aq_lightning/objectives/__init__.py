"""Losses between the two streams' block outputs."""

from aq_lightning.objectives.base import Objective as Objective
from aq_lightning.objectives.mse import BlockMSE as BlockMSE
from aq_lightning.objectives.relative import RelativeMSE as RelativeMSE
