"""Invertible maps at the sites of a block: most fold into the weights around them, some stay online."""

from aq_lightning.transforms.across_heads import AcrossHeads as AcrossHeads
from aq_lightning.transforms.activation_aware import ActivationAware as ActivationAware
from aq_lightning.transforms.affine import Affine as Affine
from aq_lightning.transforms.affine import Schedule as Schedule
from aq_lightning.transforms.base import Factor as Factor
from aq_lightning.transforms.base import FactorFactory as FactorFactory
from aq_lightning.transforms.base import Map as Map
from aq_lightning.transforms.base import SiteStatistics as SiteStatistics
from aq_lightning.transforms.base import Transform as Transform
from aq_lightning.transforms.clip import Clip as Clip
from aq_lightning.transforms.dense import Dense as Dense
from aq_lightning.transforms.diagonal import Diagonal as Diagonal
from aq_lightning.transforms.kronecker import Kronecker as Kronecker
from aq_lightning.transforms.online import Operation as Operation
from aq_lightning.transforms.pair_scale import PairScale as PairScale
from aq_lightning.transforms.rope_pair import RopePair as RopePair
from aq_lightning.transforms.rotation import LearnedRotation as LearnedRotation
from aq_lightning.transforms.rotation import Rotation as Rotation
from aq_lightning.transforms.rotation import RotationTraining as RotationTraining
from aq_lightning.transforms.shift import Shift as Shift
from aq_lightning.transforms.static_cache import StaticCache as StaticCache
