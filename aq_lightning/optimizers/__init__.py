"""Optimizers that torch does not have."""

from aq_lightning.optimizers.sign_sgd import SignSGD as SignSGD
from aq_lightning.optimizers.single_precision import SinglePrecision as SinglePrecision
