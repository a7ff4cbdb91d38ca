"""The first law for every transform, site and architecture: with quantizers off, the model answers as before."""

from __future__ import annotations

from functools import cache, partial
from typing import get_args

import pytest
import torch
from helpers import assert_close, relative_error
from tiny import MODELS, Call, Tiny, called, tiny, tiny_config, true_softmax
from torch import Tensor, nn
from torch.func import functional_call

from aq_lightning import transforms
from aq_lightning.calibration import attach, merge
from aq_lightning.calibration.attach import linears
from aq_lightning.calibration.call import answer
from aq_lightning.errors import RequestError
from aq_lightning.models.lookup import architecture_of
from aq_lightning.models.sites import AROUND_ROPE, Architecture, Site
from aq_lightning.scheme import Scheme
from aq_lightning.transforms import AcrossHeads, Affine, Dense, Diagonal, Factor, FactorFactory, Kronecker, Shift
from aq_lightning.transforms.online import carried, carrier, drop
from aq_lightning.transforms.parametrizations import Form

FACTORS = [kind for kind in vars(transforms).values() if isinstance(kind, type) and issubclass(kind, Factor)]
FACTORS = [kind for kind in FACTORS if kind is not Factor and not kind.online]  # those that can fold
CASES = [
    pytest.param(name, site.name, factor, id=f"{name}-{site.name}-{factor.__name__}")
    for name in MODELS
    for site in architecture_of(tiny_config(name)).sites
    for factor in FACTORS
]
SITES = list(dict.fromkeys(case.values[:2] for case in CASES))
ONLINE = {
    "dense": partial(Affine, online=True),
    "block": partial(Affine, online=True, block=8),  # which divides every width of these models
    **{f"kronecker-{form}": partial(Kronecker, form=form) for form in get_args(Form) if form != "fixed"},
    "kronecker-hadamard": partial(Kronecker, form="fixed", start="hadamard"),
    "heads": AcrossHeads,
    "pair": partial(Dense, start="random", online=True),
    "pair-shared": partial(Dense, form="svd", shared=True, online=True),
}
ONLINE_CASES = [(name, at, kind) for name, at in SITES for kind in ONLINE]


@pytest.fixture(autouse=True)
def float64_softmax():
    with true_softmax():
        yield


@cache
def known(name: str) -> tuple[Tiny, Call, dict[str, Tensor]]:
    """A model, how it calls its first block, and that block's parameters: made once, put back by :func:`fresh`."""
    small = tiny(name)
    return small, called(small), dict(small.blocks[0].named_parameters())


def fresh(name: str) -> tuple[Tiny, nn.Module, Call]:
    """The model, its first block as it was made, and how the model calls it."""
    small, call, parameters = known(name)
    block = small.blocks[0]
    for module, _ in carried(block):
        drop(module)
    for path, module in block.named_modules():
        for leaf in module._parameters:
            module._parameters[leaf] = parameters.get(f"{path}.{leaf}")
    return small, block, call


def scrambled(small: Tiny, block: nn.Module, requested: dict[str, list[FactorFactory]], scheme: str):
    """Attached without rounding, with random parameters far from the identity and the whole band open."""
    integers = Scheme.parse(f"{scheme}kv4" if small.architecture.attention else scheme)
    attached = attach(block, small.architecture, small.heads, requested, None, integers, torch.float64)
    for name, parameter in attached.transforms.named_parameters():
        noise = torch.randn_like(parameter)
        mixes = name.rpartition(".")[2] in ("matrix", "lower", "upper", "skew")
        parameter.data += noise / noise.shape[-1] ** 0.5 if mixes else 0.5 * noise
    for module in attached.modules():
        if isinstance(module, Affine):
            module.open_band(0, 1)
    return attached


def site_of(small: Tiny, name: str) -> Site:
    return next(site for site in small.architecture.sites if site.name == name)


def around_rope(name: str) -> bool:
    """Whether queries and keys meet rotary embedding right behind their linears."""
    return next(s for s in architecture_of(tiny_config(name)).sites if s.name == "query_key").absorbs == AROUND_ROPE


def with_tensors(block: nn.Module, tensors: dict[str, Tensor], call: Call) -> Tensor:
    """What the block would answer with other parameters."""
    return answer(lambda x, **others: functional_call(block, tensors, (x,), others), call.hidden, call.others)


def holds_shift(small: Tiny, block: nn.Module, site: Site, scheme: str) -> bool:
    """Whether every linear that would need a bias has one or can be given one."""
    switchable = {linear for together in small.architecture.bias_switches.values() for linear in together}
    producer = site.producer.partition(":")[0]
    moves = scheme == "w4a4" and producer in linears(block)
    return all(
        linear in switchable or f"{linear}.bias" in dict(block.named_parameters())
        for linear in (*site.consumers, *([producer] if moves else []))
    )


def everything(small: Tiny, block: nn.Module, scheme: str) -> dict[str, list[FactorFactory]]:
    """At every site all that it absorbs, the shift first."""
    return {
        site.name: [
            factor
            for factor in sorted(FACTORS, key=lambda kind: kind is not Shift)
            if factor.group in site.absorbs and (factor is not Shift or holds_shift(small, block, site, scheme))
        ]
        for site in small.architecture.sites
    }


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
@pytest.mark.parametrize("name, at, factor", CASES)
def test_block_is_unchanged_or_the_request_is_refused(name: str, at: str, factor: type[Factor], scheme: str) -> None:
    small, block, call = fresh(name)
    site = site_of(small, at)
    if factor.group not in site.absorbs:
        with pytest.raises(RequestError, match=f"folds at {at} .*got {factor.__name__}.*transforms.{at}"):
            scrambled(small, block, {at: [factor]}, scheme)
        return
    if factor is Shift and not holds_shift(small, block, site, scheme):
        with pytest.raises(RequestError, match=f"A shift at {at} needs a bias on .*transforms.{at}"):
            scrambled(small, block, {at: [factor]}, scheme)
        return
    attached = scrambled(small, block, {at: [factor]}, scheme)
    assert_close("before merge", call.answer, attached(call.hidden, **call.others), 1e-10)
    merge(attached, torch.float64)
    assert_close("after merge", call.answer, answer(block, call.hidden, call.others), 1e-10)
    assert type(block) is type(known(name)[0].blocks[1]), "the block is what it was"


@torch.no_grad()
@pytest.mark.parametrize("name, at", SITES)
def test_one_sided_transform_is_noticed(name: str, at: str) -> None:
    """Negative control: leaving out any one far side of any site breaks the block."""
    small, block, call = fresh(name)
    site = site_of(small, at)
    factors = [factor for factor in everything(small, block, "w4a4")[at] if factor is not Shift]
    attached = scrambled(small, block, {at: factors}, "w4a4")
    for far in site.consumers or (site.dual,):
        tensors = attached.effective(torch.float64)
        member = small.architecture.member(far, small.heads)
        original = member.read(known(name)[2][member.weight])
        tensors[member.weight] = member.write(tensors[member.weight], original)
        assert relative_error(call.answer, with_tensors(block, tensors, call)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name, at", SITES)
def test_transforms_move_the_weights(name: str, at: str) -> None:
    """The law is not met by doing nothing: every side of every transform changes, and nothing else."""
    small, block, _ = fresh(name)
    site = site_of(small, at)
    before = dict(block.named_parameters())
    ends = [small.architecture.member(end, small.heads) for end in (site.producer, *site.consumers, site.dual) if end]
    sides = {end.weight.removesuffix(".weight") for end in ends}
    for factor in everything(small, block, "w4a4")[at]:
        attached = scrambled(small, block, {at: [factor]}, "w4a4")
        moved = {
            key.removesuffix(".weight").removesuffix(".bias")
            for key, tensor in attached.effective(torch.float64).items()
            if (tensor - before.get(key, torch.zeros_like(tensor))).abs().max() > 1e-2
        }
        stays = factor is Shift and at not in attached.moved  # an RMSNorm cannot subtract: rounding errors alone meet δ
        assert moved == (set() if stays else sides), factor


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_unchanged(name: str, scheme: str) -> None:
    """Everything at once in every block, merged; the model runs as transformers runs it."""
    small = tiny(name)
    tokens = torch.randint(3, 96, (2, 16))
    expected = small.model(tokens, use_cache=False).logits
    for block in small.blocks:
        merge(scrambled(small, block, everything(small, block, scheme), scheme), torch.float64)
    assert_close("logits", expected, small.model(tokens, use_cache=False).logits, 1e-9)


def with_online(small: Tiny, block: nn.Module, scheme: str, kind: str) -> dict[str, list[FactorFactory]]:
    """At every site with consumers a shift and a diagonal where they fold, then an online factor."""
    folding = {
        at: [factor for factor in factors if factor in (Shift, Diagonal)]
        for at, factors in everything(small, block, scheme).items()
    }
    return {
        at: [*factors, ONLINE[kind]] for at, factors in folding.items() if not refusal(small.architecture, at, kind)
    }


def refusal(architecture: Architecture, at: str, kind: str) -> str:
    """What is wrong with an online factor at a site; empty: nothing."""
    site = next(site for site in architecture.sites if site.name == at)
    if site.dual and not architecture.attention and kind != "heads":
        return "lets no function be named"
    if kind == "heads" and not (site.per_head and site.consumers or site.per_expert):
        return "mixes several heads|one matrix per head|lets no function"
    if site.per_expert:
        return "every expert reads"
    return "one matrix per head, got" if site.dual and not kind.startswith("pair") else ""


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
@pytest.mark.parametrize("name, at, kind", ONLINE_CASES)
def test_online_factor_fits_every_site_with_consumers(name: str, at: str, kind: str, scheme: str) -> None:
    """Behind what folds, before and after merge; the block alone answers as before until then."""
    small, block, call = fresh(name)
    if wrong := refusal(small.architecture, at, kind):
        with pytest.raises(RequestError, match=f"({wrong}).*remove it"):
            scrambled(small, block, {at: [ONLINE[kind]]}, scheme)
        return
    attached = scrambled(small, block, {at: with_online(small, block, scheme, kind)[at]}, scheme)
    assert_close("before merge", call.answer, attached(call.hidden, **call.others), 1e-10)
    assert torch.equal(call.answer, answer(block, call.hidden, call.others)), "nothing shows outside"
    merge(attached, torch.float64)
    assert_close("after merge", call.answer, answer(block, call.hidden, call.others), 1e-10)
    assert len(list(carried(block))) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    "name, at, kind", [(n, *c) for n, *c in ONLINE_CASES if not refusal(architecture_of(tiny_config(n)), *c)]
)
def test_one_sided_online_factor_is_noticed(name: str, at: str, kind: str) -> None:
    """Negative control: without any tensor of its run-time product, or one consumer left out, the block is another."""
    small, block, call = fresh(name)
    attached = scrambled(small, block, {at: [ONLINE[kind]]}, "w4a16")
    tensors = attached.effective(torch.float64)
    for product in (key for key in tensors if carrier(key)):
        without = {**tensors, product: torch.eye(tensors[product].shape[-1]).double().expand_as(tensors[product])}
        assert relative_error(call.answer, with_tensors(block, without, call)) > 1e-3
    for far in site_of(small, at).consumers:
        weight = small.architecture.member(far, small.heads).weight
        broken = {**tensors, weight: known(name)[2][weight]}
        assert relative_error(call.answer, with_tensors(block, broken, call)) > 1e-3
    assert_close("whole", call.answer, with_tensors(block, tensors, call), 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", list(ONLINE))
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_unchanged_online(name: str, kind: str) -> None:
    """An online factor at every site with consumers of every block, merged."""
    small = tiny(name)
    tokens = torch.randint(3, 96, (2, 16))
    expected = small.model(tokens, use_cache=False).logits
    for block in small.blocks:
        merge(scrambled(small, block, with_online(small, block, "w4a4", kind), "w4a4"), torch.float64)
    assert_close("logits", expected, small.model(tokens, use_cache=False).logits, 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, at in SITES if at == "query_key" and around_rope(name)])
def test_matrix_before_rope_is_noticed(name: str) -> None:
    """Negative control: between q and k a general matrix per head does not commute with rotary embedding."""
    small, block, call = fresh(name)
    size, site = small.heads.size, site_of(small, "query_key")
    matrix = torch.eye(size, dtype=torch.float64) + 0.2 * torch.randn(size, size, dtype=torch.float64)
    tensors = dict(block.named_parameters())
    for side, turn in ((site.producer, matrix.inverse().T), (site.dual, matrix)):
        member = small.architecture.member(side, small.heads)
        for key in {member.weight, member.bias} & set(tensors):
            own = member.read(tensors[key]).unflatten(0, (-1, size))  # (heads, size, …)
            tensors[key] = member.write(tensors[key], torch.einsum("st,ht...->hs...", turn, own).flatten(0, 1))
    assert relative_error(call.answer, with_tensors(block, tensors, call)) > 1e-3
