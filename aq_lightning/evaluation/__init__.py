"""Scores of any Hugging Face model."""

from aq_lightning.evaluation.bits import effective_bits as effective_bits
from aq_lightning.evaluation.overhead import overhead as overhead
from aq_lightning.evaluation.overhead import overhead_lines as overhead_lines
from aq_lightning.evaluation.perplexity import PerplexityTest as PerplexityTest
from aq_lightning.evaluation.references import Reference as Reference
from aq_lightning.evaluation.references import check_reference as check_reference
from aq_lightning.evaluation.references import reference_bits as reference_bits
from aq_lightning.evaluation.references import replaced as replaced
from aq_lightning.evaluation.table import Row as Row
from aq_lightning.evaluation.table import render as render
