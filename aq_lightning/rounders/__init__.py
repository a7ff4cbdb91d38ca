"""Codes chosen by what a weight reads, after any transform and on any grid."""

from aq_lightning.rounders.base import Moments as Moments
from aq_lightning.rounders.base import Nearest as Nearest
from aq_lightning.rounders.base import Rounder as Rounder
from aq_lightning.rounders.coordinate_descent import CoordinateDescent as CoordinateDescent
from aq_lightning.rounders.gptq import GPTQ as GPTQ
