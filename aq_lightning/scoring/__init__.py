"""Scores of models: perplexity, divergence from a reference, and tasks."""

from aq_lightning.scoring.assessment import Assessment as Assessment
from aq_lightning.scoring.opening import Loader as Loader
from aq_lightning.scoring.opening import Opened as Opened
from aq_lightning.scoring.opening import Opening as Opening
