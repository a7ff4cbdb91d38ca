"""Fitting a block: capture, attach, train, merge."""

from aq_lightning.calibration.adapt import adapt as adapt
from aq_lightning.calibration.attach import AttachedBlock as AttachedBlock
from aq_lightning.calibration.attach import attach as attach
from aq_lightning.calibration.attach import merge as merge
from aq_lightning.calibration.batches import Pairs as Pairs
from aq_lightning.calibration.block import BlockCalibration as BlockCalibration
from aq_lightning.calibration.block import Position as Position
from aq_lightning.calibration.block import save_trained as save_trained
from aq_lightning.calibration.checkpoint import Resume as Resume
from aq_lightning.calibration.checkpoint import RunDirectory as RunDirectory
from aq_lightning.calibration.fit import Fit as Fit
from aq_lightning.calibration.fit import fit as fit
from aq_lightning.calibration.inside import Inside as Inside
from aq_lightning.calibration.interruption import Stopping as Stopping
from aq_lightning.calibration.memory import peak_memory as peak_memory
from aq_lightning.calibration.memory import reset_peak_memory as reset_peak_memory
from aq_lightning.calibration.observe import Ranges as Ranges
from aq_lightning.calibration.observe import observed as observed
from aq_lightning.calibration.ranges import activation_reach as activation_reach
from aq_lightning.calibration.ranges import weight_reach as weight_reach
from aq_lightning.calibration.streams import Streams as Streams
from aq_lightning.calibration.streams import capture as capture
from aq_lightning.calibration.watch import Cause as Cause
from aq_lightning.calibration.window import LiveWindow as LiveWindow
from aq_lightning.calibration.window import switches as switches
