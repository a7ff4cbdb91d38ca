r"""A rotation of the stream between blocks, folded into the whole model (QuaRot, arXiv 2404.00456; SpinQuant's R1), and
learnt ones inside the heads of values (SpinQuant's R2, arXiv 2405.16406).

RMS normalization without a gain commutes with an orthogonal Q, so :math:`h' = h Q` needs no work at run time: each
norm's gain moves into the linears that read it, which become :math:`W \mathrm{diag}(g) Q`, linears that write become
:math:`Q^T W`, embeddings :math:`E Q`, and the output head is a matrix of its own from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aq_lightning.calibration.fold import fold
from aq_lightning.models.pretrained import Pretrained
from aq_lightning.models.sites import Architecture, Group, Heads, Site
from aq_lightning.transforms import LearnedRotation, Map, Rotation
from aq_lightning.transforms.online import block_product


def in_basis(
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    heads: Heads,
    rotate: Callable[[Tensor], Tensor],
    values: Tensor | None = None,
) -> dict[str, Tensor]:
    """A block's parameters in another basis, differentiable in both rotations.

    Args:
        tensors: parameters by name.
        architecture: of the model.
        heads: of the model.
        rotate: ``x ↦ x Q``, (…, width) → the same.
        values: what values are multiplied by in each head, (size, size); None: nothing.
    """
    turned, offset = dict(tensors), architecture.gain_offset
    for site in (site for site in architecture.sites if site.consumers):
        readers = [architecture.member(name, heads) for name in site.consumers]
        producer = architecture.member(site.producer, heads)
        if producer.rows is None and turned[producer.weight].ndim == 1:  # a norm
            gain = turned[producer.weight] + offset
            turned[producer.weight] = torch.ones_like(gain) - offset
            for reader in readers:
                turned[reader.weight] = rotate(turned[reader.weight] * gain)
        else:  # these linears write to the stream
            for writer in readers:
                turned[writer.weight] = rotate(turned[writer.weight].mT).mT
                if writer.bias in turned:
                    turned[writer.bias] = rotate(turned[writer.bias])
    if values is None:
        return turned

    def inside(x: Tensor) -> Tensor:
        return block_product(x, values[None])

    return fold(turned, architecture, heads, {value_site(architecture).name: Map(inside, inside)}, ())


def value_site(architecture: Architecture) -> Site | None:
    """Where a matrix inside each head of values folds, if it does."""
    sites = (site for site in architecture.sites if site.per_head and site.consumers and Group.HEAD in site.absorbs)
    return next(sites, None)


@dataclass(frozen=True)
class Rotated(Pretrained):
    """A model in another basis: the same function, with other weights. Its blocks are in float32 at least."""

    rotation: Rotation | LearnedRotation = Rotation()

    def block(self, index: int) -> nn.Module:
        wide = torch.promote_types(self.storage, torch.float32)
        block = super().block(index).to(wide)
        tensors = {name: tensor.detach().double() for name, tensor in block.named_parameters()}
        learned = isinstance(self.rotation, LearnedRotation) and len(self.rotation.values)
        values = self.rotation.values[index] if learned else None
        turned = in_basis(tensors, self.architecture, self.heads, self.rotation, values)
        block.load_state_dict({name: tensor.to(wide) for name, tensor in turned.items()}, strict=False)
        return block

    def shell(self) -> PreTrainedModel:
        shell = super().shell()
        embedding, head = shell.get_input_embeddings(), shell.get_output_embeddings()
        norm, offset = shell.get_submodule(self.architecture.final_norm), self.architecture.gain_offset
        gain = norm.weight.double() + offset
        for module, weight in ((embedding, embedding.weight), (head, head.weight.double() * gain)):
            rotated = self.rotation(weight).to(self.storage).contiguous()
            module.weight = nn.Parameter(rotated, requires_grad=False)
        norm.weight = nn.Parameter(torch.ones_like(norm.weight) - offset, requires_grad=False)
        return shell

    def config(self) -> dict[str, object]:
        return {**super().config(), "tie_word_embeddings": False}


def rotated(pretrained: Pretrained, rotation: Rotation | LearnedRotation | None) -> Pretrained:
    """The model in another basis, if one is asked for; :meth:`Rotation.check` has passed."""
    if rotation is None:
        return pretrained
    return Rotated(**{field.name: getattr(pretrained, field.name) for field in fields(pretrained)}, rotation=rotation)
