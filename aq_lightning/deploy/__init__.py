"""Quantized models at work: packed linears, transformers' ``from_pretrained``, fast generation, a server."""

from aq_lightning.deploy.fused import fuse as fuse
from aq_lightning.deploy.generation import Generator as Generator
from aq_lightning.deploy.linear import Int4Linear as Int4Linear
from aq_lightning.deploy.loading import load as load
from aq_lightning.deploy.quantizer import disable as disable
from aq_lightning.deploy.quantizer import enable as enable
from aq_lightning.deploy.quantizer import enabled as enabled
