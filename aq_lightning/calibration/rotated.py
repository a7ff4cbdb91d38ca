r"""A rotation of the stream between blocks, folded into the whole model (QuaRot, arXiv 2404.00456; SpinQuant's R1).

RMS normalization without a gain commutes with an orthogonal Q, so :math:`h' = h Q` needs no work at run time: each
norm's gain moves into the linears that read it, which become :math:`W \mathrm{diag}(g) Q`, linears that write become
:math:`Q^T W`, embeddings :math:`E Q`, and the output head is a matrix of its own from then on.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import PreTrainedModel

from aq_lightning.models.pretrained import Pretrained
from aq_lightning.transforms import Rotation


@dataclass(frozen=True)
class Rotated(Pretrained):
    """A model in another basis: the same function, with other weights. Its blocks are in float32 at least."""

    rotation: Rotation = Rotation()

    def block(self, index: int) -> nn.Module:
        rotate, offset = self.rotation, self.architecture.gain_offset
        wide = torch.promote_types(self.storage, torch.float32)
        block = super().block(index).to(wide)
        tensors = {name: tensor.detach().double() for name, tensor in block.named_parameters()}
        for site in (site for site in self.architecture.sites if site.consumers):
            readers = [self.architecture.member(name, self.heads) for name in site.consumers]
            producer = self.architecture.member(site.producer, self.heads)
            if producer.rows is None and tensors[producer.weight].ndim == 1:  # a norm
                gain = tensors[producer.weight] + offset
                tensors[producer.weight] = torch.ones_like(gain) - offset
                for reader in readers:
                    tensors[reader.weight] = rotate(tensors[reader.weight] * gain)
            else:  # these linears write to the stream
                for writer in readers:
                    tensors[writer.weight] = rotate(tensors[writer.weight].mT).mT
                    if writer.bias in tensors:
                        tensors[writer.bias] = rotate(tensors[writer.bias])
        block.load_state_dict({name: tensor.to(wide) for name, tensor in tensors.items()}, strict=False)
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


def rotated(pretrained: Pretrained, rotation: Rotation | None) -> Pretrained:
    """The model in another basis, if one is asked for; :meth:`Rotation.check` has passed."""
    if rotation is None:
        return pretrained
    return Rotated(**{field.name: getattr(pretrained, field.name) for field in fields(pretrained)}, rotation=rotation)
