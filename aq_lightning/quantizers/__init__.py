"""From real numbers to the integer grid: weight ranges and dynamic activations."""

from aq_lightning.quantizers.activations import quantize_cache as quantize_cache
from aq_lightning.quantizers.activations import quantize_tokens as quantize_tokens
from aq_lightning.quantizers.activations import quantized as quantized
from aq_lightning.quantizers.activations import quantized_activations as quantized_activations
from aq_lightning.quantizers.base import WeightQuantizer as WeightQuantizer
from aq_lightning.quantizers.base import WeightQuantizerFactory as WeightQuantizerFactory
from aq_lightning.quantizers.clipping import LearnedClipping as LearnedClipping
from aq_lightning.quantizers.learned_rounding import LearnedRounding as LearnedRounding
from aq_lightning.quantizers.minmax import MinMax as MinMax
from aq_lightning.quantizers.search import GridSearch as GridSearch
from aq_lightning.quantizers.searched_range import SearchedRange as SearchedRange
