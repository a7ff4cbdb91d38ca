"""What an online factor leaves behind: products on the modules whose activations they multiply.

A norm carries the products of its output, which all consumers of its site read; elsewhere the one consumer carries
those of its input, before anything else sees it; between queries and keys attention does, behind rotary embedding.
Their tensors are ordinary parameters of the model, named
``<module>.online.<position>.<tensor>``, and these names say what they are: nothing else is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aq_lightning.attention import Handle, Heads, attentions, hook_attention
from aq_lightning.errors import RequestError
from aq_lightning.kernels.kronecker_matmul.naive import Kronecker, clipped, kronecker_product
from aq_lightning.models.sites import SiteShape

_NAME = "online"


class Operation(nn.Module, ABC):
    """``x ↦ x A⁻¹`` of one factor. Subclasses are final and name their tensors as no other does."""

    names: ClassVar[tuple[str, ...]]
    """Names of its tensors."""
    on_heads: ClassVar[bool] = False
    """Whether it acts on what attention multiplies, as heads, instead of on channels."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name in self.names:
            self.register_parameter(name, nn.Parameter(tensors[name], requires_grad=False))

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → the same."""

    @abstractmethod
    def multiply_adds(self, channels: int) -> int:
        """Multiply–adds of one token of so many channels."""


class BlockProduct(Operation):
    """A block-diagonal ``A⁻¹``: ``inverse`` is (blocks, size, size)."""

    names: ClassVar[tuple[str, ...]] = ("inverse",)

    def forward(self, x: Tensor) -> Tensor:
        return block_product(x, self.inverse)

    def multiply_adds(self, channels: int) -> int:
        return channels * self.inverse.shape[-1]


class KroneckerProduct(Operation):
    """``A₁⁻¹ ⊗ A₂⁻¹``: ``left`` is (n₁, n₁) and ``right`` (n₂, n₂), of n₁ n₂ channels."""

    names: ClassVar[tuple[str, ...]] = ("left", "right")

    def forward(self, x: Tensor) -> Tensor:
        return kronecker_product(x, self.left, self.right)

    def multiply_adds(self, channels: int) -> int:
        return channels * (self.left.shape[-1] + self.right.shape[-1])


class HeadProduct(Operation):
    """``A_h⁻¹ ⊗ I``: ``heads`` is (heads, heads)."""

    names: ClassVar[tuple[str, ...]] = ("heads",)

    def forward(self, x: Tensor) -> Tensor:
        return head_product(x, self.heads)

    def multiply_adds(self, channels: int) -> int:
        return channels * self.heads.shape[-1]


class PairProduct(Operation):
    """Queries times A⁻¹ and keys times Aᵀ: ``query`` and ``key`` are (blocks, size, size); a block serves the heads of
    one key-value head, a single one all."""

    names: ClassVar[tuple[str, ...]] = ("query", "key")
    on_heads: ClassVar[bool] = True

    def forward(self, x: Heads) -> Heads:
        query, key = (
            block_product(heads.transpose(1, 2).flatten(2), matrix).view(heads.transpose(1, 2).shape).transpose(1, 2)
            for heads, matrix in ((x.query, self.query), (x.key, self.key))
        )
        return x._replace(query=query, key=key)

    def multiply_adds(self, channels: int) -> int:
        return channels * self.query.shape[-1]


class TokenClip(Operation):
    """Each token cut to fractions of its own range: ``clip`` is (2), of its least and of its greatest channel."""

    names: ClassVar[tuple[str, ...]] = ("clip",)

    def forward(self, x: Tensor) -> Tensor:
        return clipped(x, self.clip)

    def multiply_adds(self, channels: int) -> int:
        return 0


class CacheClip(Operation):
    """Keys and values of each token and head cut to fractions of their range, (2) each as in :class:`TokenClip`."""

    names: ClassVar[tuple[str, ...]] = ("key_clip", "value_clip")
    on_heads: ClassVar[bool] = True

    def forward(self, x: Heads) -> Heads:
        return x._replace(key=clipped(x.key, self.key_clip), value=clipped(x.value, self.value_clip))

    def multiply_adds(self, channels: int) -> int:
        return 0


class CacheGrid(Operation):
    """Grids of keys and values that are the same for all tokens: steps and zero points, (heads, runs) each."""

    names: ClassVar[tuple[str, ...]] = ("key_step", "key_zero", "value_step", "value_zero")
    on_heads: ClassVar[bool] = True

    def forward(self, x: Heads) -> Heads:
        return x._replace(key_grid=(self.key_step, self.key_zero), value_grid=(self.value_step, self.value_zero))

    def multiply_adds(self, channels: int) -> int:
        return 0


def block_product(x: Tensor, matrix: Tensor) -> Tensor:
    """(…, blocks · group · size) times each block's matrix, (blocks, size, size)."""
    shape = SiteShape(matrix.shape[0], matrix.shape[-1])
    return shape.join(torch.einsum("...bgs,bst->...bgt", shape.split(x), matrix))


def head_product(x: Tensor, matrix: Tensor) -> Tensor:
    """(…, heads · size) times ``matrix ⊗ I``, of (heads, heads)."""
    return (matrix.mT @ x.unflatten(-1, (matrix.shape[0], -1))).flatten(-2)


class Online(nn.Sequential):
    """The products of one module, in order. While their tensors are empty it hands its input on.

    They are empty in a block that is being fitted: every call brings its own (``functional_call``), and a candidate
    without online factors brings none.
    """

    handle: RemovableHandle | Handle

    def forward(self, x: Tensor) -> Tensor:
        empty = any(tensor.numel() == 0 for tensor in self.parameters())
        return x if empty else super().forward(x)

    def kronecker(self) -> Kronecker | None:
        """The products as one that a kernel knows: a Kronecker product, and a clip behind it or none. None: others."""
        first, *rest = self
        if not isinstance(first, KroneckerProduct) or any(not isinstance(each, TokenClip) for each in rest[:1]):
            return None
        return Kronecker(first.left, first.right, *(each.clip for each in rest)) if len(rest) < 2 else None


def carry(module: nn.Module, operations: Sequence[Operation]) -> None:
    """Makes a norm multiply its output by products, a linear its input, attention its queries and keys; what it carried
    before gives way."""
    drop(module)
    online = Online(*operations)
    module.add_module(_NAME, online)
    if isinstance(module, nn.Linear):
        online.handle = module.register_forward_pre_hook(_before)
        _run_first(module, online.handle.id)  # quantizers see the product
    elif module in attentions(module):
        online.handle = hook_attention(module, online, prepend=True)
    else:
        online.handle = module.register_forward_hook(_after)


def carry_empty(module: nn.Module, operations: Sequence[Operation]) -> None:
    """As :func:`carry`, without numbers yet; on the meta device, where there are none anyway, the shapes stay."""
    device = next(module.parameters()).device
    for operation in operations if device.type != "meta" else ():
        for name in operation.names:
            setattr(operation, name, nn.Parameter(torch.empty(0, device=device), requires_grad=False))
    carry(module, operations)


def drop(module: nn.Module) -> Online | None:
    """Leaves a module as it was before :func:`carry`, and hands over what it carried."""
    online = of(module)
    if online is not None:
        online.handle.remove()
        delattr(module, _NAME)
    return online


def of(module: nn.Module) -> Online | None:
    """What a module carries."""
    online = dict(module.named_children()).get(_NAME)
    return online if isinstance(online, Online) else None


def carried(root: nn.Module) -> Iterator[tuple[nn.Module, Online]]:
    """The modules below ``root`` that carry products."""
    for module in list(root.modules()):
        online = of(module)
        if online is not None:
            yield module, online


def online_name(module: str, position: int, tensor: str) -> str:
    """Name of a tensor of the product at ``position`` on a module."""
    return f"{module}.{_NAME}.{position}.{tensor}"


def carrier(name: str) -> str:
    """The module that carries the tensor of this name; empty if it is no product's."""
    module, found, _ = name.rpartition(f".{_NAME}.")
    return module if found else ""


def carry_stored(root: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Makes the modules of ``root`` carry exactly the products whose tensors are given, by their names in ``root``.

    Raises:
        RequestError: tensors that are no product known here.
    """
    steps: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        position, _, leaf = name.removeprefix(f"{carrier(name)}.{_NAME}.").partition(".")
        steps.setdefault(carrier(name), {}).setdefault(int(position), {})[leaf] = tensor
    for module, _ in carried(root):
        drop(module)
    for path, products in steps.items():
        carry(root.get_submodule(path), [_operation(path, products[position]) for position in sorted(products)])


def _operation(path: str, tensors: dict[str, Tensor]) -> Operation:
    kinds = [kind for kind in Operation.__subclasses__() if set(kind.names) == set(tensors)]
    if not kinds:
        raise RequestError(
            f"An online product is one of {', '.join(kind.__name__ for kind in Operation.__subclasses__())}, got the "
            f"tensors {', '.join(sorted(tensors))} on {path}: read it with the version that wrote it."
        )
    return kinds[0](**tensors)


def _run_first(module: nn.Module, hook: int) -> None:
    """Moves a pre-hook ahead of the others. ``prepend=True`` would leave them where they lie in memory, where compiled
    code of PyTorch 2.11 looks them up, and take one for another."""
    hooks = module._forward_pre_hooks
    for other in [key for key in hooks if key != hook]:
        hooks[other] = hooks.pop(other)


def _after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return module.online(output)


def _before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (module.online(inputs[0]), *inputs[1:])
