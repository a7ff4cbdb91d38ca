"""Attaching a recipe to a block and merging it back: the block itself is never retyped."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aq_lightning.calibration.call import BlockFunction, answer
from aq_lightning.calibration.fold import Scaled, add_biases, add_shift_biases, fold, shift_directions
from aq_lightning.calibration.places import carrier_of, check_cache, check_place, check_rounded, static_cache
from aq_lightning.errors import RequestError
from aq_lightning.experts import stacks
from aq_lightning.kernels.fake_quantize import Request, fake_quantize
from aq_lightning.models.sites import Architecture, Group, Heads, Site, SiteShape
from aq_lightning.qtensor import QTensor
from aq_lightning.quantizers import WeightQuantizer, WeightQuantizerFactory
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import FactorFactory, Map, Transform
from aq_lightning.transforms.online import carrier, carry_empty, carry_stored, drop, online_name


class AttachedBlock(nn.Module):
    """A frozen block seen through its transforms and weight quantizers.

    The block's parameters stay what they are: each forward pass computes the folded, fake-quantized tensors once and
    calls the block with them. Of that the block shows nothing, but that modules carry empty online products where
    there are online factors, until :meth:`detach` or merge. Activation quantization is separate:
    :func:`aq_lightning.quantizers.quantized`.
    """

    def __init__(
        self,
        block: nn.Module,
        architecture: Architecture,
        heads: Heads,
        transforms: Mapping[str, Transform],
        quantizers: Mapping[str, WeightQuantizer],
        moved: Collection[str],
    ) -> None:
        super().__init__()
        self.block = block.requires_grad_(False)
        self.architecture = architecture
        self.heads = heads
        self.transforms = nn.ModuleDict(transforms)
        self.quantizers = nn.ModuleDict({_key(name): quantizer for name, quantizer in quantizers.items()})
        self.moved = frozenset(moved)
        sites = {site.name: site for site in architecture.sites}
        self.carriers = {
            name: carrier_of(block, architecture, sites[name]) for name, each in transforms.items() if each.online()
        }
        self.claim()

    def claim(self) -> None:
        """Makes the block carry empty products of these transforms, not of others that it was attached to since."""
        for name, module in self.carriers.items():
            operations = [factor.operation() for factor in self.transforms[name].online()]
            carry_empty(self.block.get_submodule(module), operations)

    def detach(self) -> None:
        """Leaves the block as it was, for a plan that was only checked."""
        for module in self.carriers.values():
            drop(self.block.get_submodule(module))

    def forward(self, hidden: Tensor, **arguments: object) -> Tensor:
        """The quantized block's answer, (batch, length, hidden) → the same."""
        kind = hidden.device.type
        used = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            tensors = self.effective(hidden.dtype, used)
        return answer(lambda x, **others: functional_call(self.block, tensors, (x,), others), hidden, arguments)

    @torch.no_grad()
    def snapshot(self) -> BlockFunction:
        """The quantized block as it is now; its tensors are computed once, in float64 as :func:`merge` does."""
        dtype = next(self.block.parameters()).dtype
        tensors = {name: tensor.to(dtype) for name, tensor in self.effective(torch.float64).items()}
        return lambda hidden, **arguments: functional_call(self.block, tensors, (hidden,), arguments)

    def effective(self, dtype: torch.dtype, used: torch.dtype | None = None) -> dict[str, Tensor]:
        """Parameters of the transformed and fake-quantized block, by name; differentiable.

        Args:
            dtype: in which they are computed.
            used: of the weights handed out, where linears will read them in another; None: the same.
        """
        linear = {name for name, weight in self.block.named_parameters() if weight.ndim == 2}
        folded, maps = self.folded(dtype, {name for name in linear if _key(name) in self.quantizers})
        directions = shift_directions(folded, self.architecture.sites, maps, self.moved)
        tensors, gains = {}, {}
        for name, tensor in folded.items():
            if isinstance(tensor, Scaled):
                tensors[name], gain = fake_quantize(self._request(name, tensor, directions, dtype, used or dtype))
                if name in directions:
                    gains[name] = gain
            else:
                tensors[name] = self.quantizers[_key(name)](tensor) if _key(name) in self.quantizers else tensor
        for name, (direction, whole) in directions.items():
            if whole and name not in gains:  # a weight that is not rounded
                gains[name] = folded[name] @ direction
        return add_biases(tensors, gains)

    def _request(
        self, name: str, weight: Scaled, directions: Mapping, dtype: torch.dtype, used: torch.dtype
    ) -> Request:
        quantizer = self.quantizers[_key(name)]
        low, high = (fraction.to(dtype) for fraction in quantizer.fractions())  # (out, groups) each
        direction, whole = directions.get(name, (None, False))
        return Request(
            weight.value, weight.rows, weight.columns, low, high, direction, quantizer.offset,
            quantizer.grid, quantizer.storage, rounding_only=not whole, dtype=used,
        )  # fmt: skip

    def folded(
        self, dtype: torch.dtype, kept: Collection[str] = ()
    ) -> tuple[dict[str, Tensor | Scaled], dict[str, Map]]:
        """Parameters of the transformed block before rounding, those of online products included, and the maps; the
        scales of weights ``kept`` are apart."""
        maps = {name: transform(dtype) for name, transform in self.transforms.items()}
        own = {name: tensor for name, tensor in self.block.named_parameters() if not carrier(name)}
        tensors = {name: tensor.to(dtype) for name, tensor in own.items()}
        folded = fold(tensors, self.architecture, self.heads, maps, self.moved, kept)
        for site, module in self.carriers.items():
            for position, product in enumerate(maps[site].online):
                folded |= {online_name(module, position, name): tensor for name, tensor in product.items()}
        return folded, maps


def attach(
    block: nn.Module,
    architecture: Architecture,
    heads: Heads,
    transforms: Mapping[str, Sequence[FactorFactory]],
    weight_quantizer: WeightQuantizerFactory | None,
    scheme: Scheme,
    storage: torch.dtype,
) -> AttachedBlock:
    """Builds the transforms and quantizers of a block; works on the meta device, so that it can check a plan.

    Args:
        block: one HF block.
        architecture: its sites.
        heads: its attention heads.
        transforms: site name → factor factories.
        weight_quantizer: range rule of every weight; None leaves weights unrounded.
        scheme: integers of weights and activations.
        storage: dtype in which the checkpoint keeps scales.

    Raises:
        RequestError: an unknown site, a factor that its site cannot absorb and that is not online, a linear that
            cannot take the bias that a shift needs, a group size that does not divide, or keys and values that
            cannot be rounded.
    """
    check_cache(architecture, heads, scheme)
    sites = {site.name: site for site in architecture.sites}
    unknown = sorted(set(transforms) - set(sites))
    if unknown:
        raise RequestError(f"A transform is named after a site of the architecture, got {unknown[0]!r}: "
                           f"choose from {', '.join(sites)}.")  # fmt: skip
    built, behind = {}, static_cache(architecture.sites, heads, scheme, storage)
    for name in {**transforms, **behind}:
        shape = site_shape(block, sites[name], heads)
        factors = [factory(shape) for factory in transforms.get(name, ())]
        for factor in factors:
            check_place(block, architecture, sites[name], factor)
            check_rounded(sites[name], factor, scheme)
        factors += [behind[name]] if name in behind else []
        if factors:
            built[name] = Transform(factors).to(next(block.parameters()).device)
    shifted = [sites[name] for name, transform in built.items() if transform.factors[0].group is Group.SHIFT]
    moved = {site.name for site in shifted if scheme.activation is not None and _holds_bias(block, _producer(site))}
    for site in shifted:
        for linear in site.consumers + ((_producer(site),) if site.name in moved else ()):
            _check_bias(block, architecture, site, linear)
    quantizers = {}
    for name, weight in weights(block).items() if weight_quantizer is not None else ():
        quantizer = weight_quantizer(scheme.weight, tuple(weight.flatten(0, -2).shape), storage)
        quantizers[name] = quantizer.to(weight.device)
    return AttachedBlock(block, architecture, heads, built, quantizers, moved)


@torch.no_grad()
def merge(
    attached: AttachedBlock,
    storage: torch.dtype,
    biased: Collection[str] = (),
    codes: Mapping[str, QTensor] = MappingProxyType({}),
) -> dict[str, QTensor | Tensor]:
    """Rounds for good, in float64, and leaves a plain HF block that holds exactly what the checkpoint will; its modules
    carry the products of online factors.

    Args:
        attached: a block after training.
        storage: dtype of everything that is not an integer.
        biased: linears to which the model's configuration will give a bias: zeros where there is none.
        codes: weights that a rounder has rounded; the quantizers round the others.

    Returns:
        The block's tensors by name: quantized weights as :class:`QTensor`, all others in ``storage``.
    """
    folded, maps = attached.folded(torch.float64)
    merged: dict[str, QTensor | Tensor] = {
        name: attached.quantizers[_key(name)].quantize(tensor) if _key(name) in attached.quantizers else tensor
        for name, tensor in folded.items()
        if name not in codes
    }
    merged |= codes
    values = {
        name: tensor.dequantize(torch.float64) if isinstance(tensor, QTensor) else tensor
        for name, tensor in merged.items()
    }
    values = add_shift_biases(folded, values, attached.architecture.sites, maps, attached.moved)
    for together in attached.architecture.bias_switches.values():
        if any(f"{name}.bias" in values or name in biased for name in together):
            for name in together:
                weight = folded[f"{name}.weight"]
                values.setdefault(f"{name}.bias", weight.new_zeros(weight.shape[0]))
    for name, value in values.items():
        if not isinstance(merged.get(name), QTensor):
            merged[name] = value.to(storage)
    install(attached.block, merged)
    return merged


@torch.no_grad()
def install(block: nn.Module, tensors: Mapping[str, QTensor | Tensor]) -> None:
    """Replaces a block's parameters by merged ones, in the block's own dtype; a bias appears where there was none, and
    modules carry the online products given and no others."""
    like, shapes = next(block.parameters()), {name: stack.shape for name, stack in stacks(block).items()}
    carry_stored(block, {name: tensor.to(like) for name, tensor in tensors.items() if carrier(name)})
    for name, tensor in ((name, tensor) for name, tensor in tensors.items() if not carrier(name)):
        value = tensor.dequantize(like.dtype) if isinstance(tensor, QTensor) else tensor.to(like.dtype)
        value = value.reshape(shapes.get(name, value.shape))
        path, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(path), leaf, nn.Parameter(value.to(like.device), requires_grad=False))


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def weights(block: nn.Module) -> dict[str, nn.Parameter]:
    """What is quantized, by name: weights (out, in) of linears and (experts, out, in) of experts; no router's."""
    return {f"{name}.weight": linear.weight for name, linear in linears(block).items()} | stacks(block)


def site_shape(block: nn.Module, site: Site, heads: Heads) -> SiteShape:
    """Blocks and sizes of a site: key-value heads, experts, or all channels that consumers read or norms scale."""
    rotary = heads.rotary if site.dual else None
    if site.per_head:
        group = heads.query // heads.key_value if site.consumers else 1
        return SiteShape(heads.key_value, heads.size, rotary, group, bool(site.dual))
    if site.per_expert:
        experts, _, width = block.get_parameter(site.consumers[0]).shape
        return SiteShape(experts, width)
    if site.consumers:
        return SiteShape(1, block.get_submodule(site.consumers[0]).weight.shape[1])
    return SiteShape(1, block.get_submodule(site.producer).weight.shape[0], rotary, dual=bool(site.dual))


def gained_biases(attached: AttachedBlock) -> set[str]:
    """Linears that a recipe's shifts give a bias."""
    shifted = [
        site
        for site in attached.architecture.sites
        if site.name in attached.transforms and attached.transforms[site.name].factors[0].group is Group.SHIFT
    ]
    producers = {_producer(site) for site in shifted if site.name in attached.moved}
    return producers | {linear for site in shifted for linear in site.consumers}


def _key(name: str) -> str:
    """Parameter name as a module name, which may hold no dot."""
    return name.replace(".", "/")


def _producer(site: Site) -> str:
    """The module that produces a site, which may hold other parts too."""
    return site.producer.partition(":")[0]


def _holds_bias(block: nn.Module, producer: str) -> bool:
    module = block.get_submodule(producer)
    return isinstance(module, nn.Linear) or "bias" in dict(module.named_parameters())


def _check_bias(block: nn.Module, architecture: Architecture, site: Site, linear: str) -> None:
    switchable = any(linear in together for together in architecture.bias_switches.values())
    if not switchable and f"{linear}.bias" not in dict(block.named_parameters()):
        raise RequestError(
            f"A shift at {site.name} needs a bias on {linear}, and this architecture has none there and no switch for "
            f"one: remove Shift from transforms.{site.name}."
        )
