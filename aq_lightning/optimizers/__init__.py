"""Optimizers that torch does not have."""

from aq_lightning.optimizers.cayley_sgd import CayleySGD as CayleySGD
from aq_lightning.optimizers.sign_sgd import SignSGD as SignSGD
from aq_lightning.optimizers.single_precision import SinglePrecision as SinglePrecision
