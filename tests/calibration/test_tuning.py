"""Tuning of scales and norms: the right gradient, codes untouched, and a model nearer to the one it comes from."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from fitting import CPU, LIGHTNING, plain_recipe
from helpers import assert_close, tiny_llama
from lightning.pytorch import Trainer

from aq_lightning.calibration import Inside, Pairs, Stopping, Streams, WholeModel, assemble, capture, retuned, tune
from aq_lightning.calibration.streams import logits
from aq_lightning.calibration.tuned import TunedScales
from aq_lightning.calibration.tuning import Tuned
from aq_lightning.errors import RequestError
from aq_lightning.models.llama import SPEC
from aq_lightning.models.loading import Pretrained, Source
from aq_lightning.qtensor import QTensor, encode, grid_of
from aq_lightning.recipe import ScaleTuning
from aq_lightning.scheme import Grid
