"""Schedules and observers of a calibration, as Lightning callbacks."""

from callbacks.conditioning import ConditionNumber as ConditionNumber
from callbacks.double_precision_checkpoint import DoublePrecisionCheckpoint as DoublePrecisionCheckpoint
from callbacks.gradual_mask import GradualMask as GradualMask
from callbacks.progress import Progress as Progress
from callbacks.report import Report as Report
