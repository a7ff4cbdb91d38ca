"""Generation with packed weights against the same model in float16: tokens per second, time to the first.

Weights are random, in the shape of a well-known model, rounded to nearest; the float16 model has the same rounded
weights. Both run through the same static key–value cache, torch.compile and CUDA graph
(``aq_lightning.deploy.Generator``); the float16 model is transformers' own, with its linears as they are. Before
anything is timed, packed logits must be near the float16 ones; where activations are rounded, which random layers
magnify one after the other, logits must be finite, and what each linear of the first layer answers be near what the
float16 one answers to the same activations, rounded. Results are written after
every measurement, and no measurement begins once ``--seconds`` have passed.

    python benchmarks/generation.py --out generation.json
    python benchmarks/generation.py --schemes w4a4sym+online
    python benchmarks/generation.py --shape tiny --device cpu --seconds 60
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from aq_lightning.deploy import Int4Linear, fuse
from aq_lightning.deploy.decoding import Decoder, Sampling, Shape, Way
from aq_lightning.qtensor import QTensor, encode, grid_of
from aq_lightning.quantizers.activations import quantize_tokens
from aq_lightning.scheme import Grid, Scheme
from aq_lightning.transforms.kronecker import divided
from aq_lightning.transforms.online import HeadProduct, KroneckerProduct, Operation, TokenClip, carry

SHAPES = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
}  # fmt: skip
REPETITIONS = 5
FULL = "fp16"
ONLINE = "+online"
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""Module of a layer that carries online products → the linears that read what they make."""


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    model: str
    batch: int
    prompt: int
    first_ms: float
    """From the call to the first token on the host; the prompt's length has come before."""
    rate: float | None
    """Tokens per second behind the first, of all sequences together; None: not measured."""
    setup_s: float | None
    """Compiling and recording a step."""
    weights_gib: float


def rounded(weight: Tensor, scheme: Scheme) -> QTensor:
    """A weight (N, K) rounded to nearest."""
    groups = weight.float().unflatten(1, (scheme.weight.groups(weight.shape[1]), -1))  # (N, groups, size)
    scale, zero = grid_of(groups.amin(-1), groups.amax(-1), scheme.weight, torch.float16)
    codes = encode(groups, scale[..., None], zero[..., None], scheme.weight).flatten(1)
    return QTensor(codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), scheme.weight)


def full_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def products(carrier: str, columns: int, heads: int) -> tuple[Operation, Operation]:
    """What the online recipe multiplies the inputs of a linear by, orthogonal here, and its inverse; float32."""
    sizes = (heads,) if carrier == "self_attn.o_proj" else divided(columns, "random")
    factors = [torch.linalg.qr(torch.randn(size, size))[0] for size in sizes]
    kind, names = (HeadProduct, ["heads"]) if len(sizes) == 1 else (KroneckerProduct, ["left", "right"])
    there, back = (kind(**dict(zip(names, each, strict=True))) for each in (factors, [f.mT for f in factors]))
    return there, back


Inputs = dict[str, Callable[[Tensor], Tensor]]
"""Linear of the first layer → what packed kernels make of what it reads, in the full model's coordinates."""


def packed_model(full: PreTrainedModel, scheme: Scheme, online: bool) -> tuple[PreTrainedModel, Inputs]:
    """The model with packed linears, all else shared; the full one gets the rounded weights.

    Args:
        full: the model.
        scheme: of the packed one.
        online: whether it multiplies what linears read by matrices, and cuts it, as configs/affinequant-online.yaml.
    """
    with torch.device("meta"):
        packed = AutoModelForCausalLM.from_config(full.config, dtype=full.dtype).eval()
    inputs: Inputs = {}
    for index, layer in enumerate(full.model.layers):
        for carrier, readers in READERS.items():
            there, back = products(
                carrier, layer.get_submodule(readers[0]).in_features, full.config.num_attention_heads
            )
            there, back = there.to(full.device), back.to(full.device)
            for reader in readers:
                linear = layer.get_submodule(reader)
                weight = rounded(there(linear.weight.float()) if online else linear.weight, scheme)
                dense = weight.dequantize(torch.float32)
                linear.weight.copy_(back(dense) if online else dense)
                packed.model.layers[index].set_submodule(reader, Int4Linear.of(weight, scheme))
                if index == 0 and scheme.activation is not None:
                    inputs[reader] = partial(read, scheme.activation, (there, back) if online else None)
            if online:
                clip = TokenClip(clip=torch.ones(2)).to(full.device)
                carry(
                    packed.model.layers[index].get_submodule(carrier),
                    [deepcopy(there).to(full.dtype), clip.to(full.dtype)],
                )
    for name, tensor in [*full.named_parameters(), *full.named_buffers()]:
        parent, _, leaf = name.rpartition(".")
        if not isinstance(packed.get_submodule(parent), Int4Linear):
            setattr(packed.get_submodule(parent), leaf, tensor)
    return fuse(packed.requires_grad_(False)), inputs


def read(grid: Grid, products: tuple[Operation, Operation] | None, x: Tensor) -> Tensor:
    """What a packed linear makes of (…, K), its product undone: float32 in between."""
    if products is None:
        return quantize_tokens(x, grid)
    there, back = products
    return back(quantize_tokens(there(x.float()), grid)).to(x.dtype)


def gibibytes(model: nn.Module) -> float:
    """Of parameters and buffers."""
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()}) / 2**30


def tolerance(scheme: Scheme) -> float:
    """Greatest relative :func:`difference`: products in float16; and where activations are rounded, a value half-way
    between two integers, which another order of sums takes to either."""
    return 3e-2 if scheme.activation is None else 5e-3 + 0.7 / 2**scheme.activation.bits


@torch.no_grad()
def difference(full: PreTrainedModel, packed: PreTrainedModel, inputs: Inputs) -> float:
    """Relative difference from the full model, of a prompt long enough for one kernel and short enough for another.

    Of logits; or where activations are rounded, which turns small differences into great ones layer upon layer, of what
    each linear of the first layer answers.
    """
    ids = torch.randint(full.config.vocab_size, (1, 80), device=full.device)
    errors = []
    for tokens in (ids, ids[:, :1]):
        logits = packed(tokens).logits
        pairs = answers(full, packed, tokens, inputs) if inputs else [(full(tokens).logits, logits)]
        errors += [float((actual.float() - expected.float()).norm() / expected.float().norm())
                   for expected, actual in pairs]  # fmt: skip
        errors += [] if logits.isfinite().all() else [float("inf")]
    return max(float("inf") if error != error else error for error in errors)


def answers(
    full: PreTrainedModel, packed: PreTrainedModel, tokens: Tensor, inputs: Inputs
) -> list[tuple[Tensor, Tensor]]:
    """What each linear of both first layers answers to what the full model's reads; the full one to that as the packed
    one is to round it."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in inputs:
            linear = full.model.layers[0].get_submodule(name)
            hook = linear.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
            hooks.callback(hook.remove)
        full(tokens)
    linears = [[model.model.layers[0].get_submodule(name) for model in (full, packed)] for name in inputs]
    return [(one(read(seen[name])), other(seen[name]))
            for (name, read), (one, other) in zip(inputs.items(), linears, strict=True)]  # fmt: skip


def first_token(decoder: Decoder, ids: Tensor) -> float:
    """Milliseconds to the first token, the median of several."""
    times = []
    for _ in range(REPETITIONS + 2):
        began = time.perf_counter()
        for _ in decoder.stream(ids, None, 1, Sampling()):
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def rate(decoder: Decoder, ids: Tensor, new: int) -> tuple[float, float]:
    """Tokens per second behind the first, and seconds of the first run beyond those of the others."""
    spans, wholes = [], []
    for _ in range(4):
        began = time.perf_counter()
        arrivals = [time.perf_counter() for _ in decoder.stream(ids, None, new, Sampling())]
        wholes.append(time.perf_counter() - began)
        spans.append(arrivals[-1] - arrivals[0])
    return len(ids) * (new - 1) / statistics.median(spans[1:]), wholes[0] - statistics.median(wholes[1:])


def profiled(decoder: Decoder, ids: Tensor, new: int) -> str:
    """What the device does for an answer, kernel by kernel."""
    with torch.profiler.profile() as profile:
        list(decoder.stream(ids, None, max(new, 1), Sampling()))
    return profile.key_averages().table(sort_by="cuda_time_total", row_limit=40)


def measure(
    name: str, model: PreTrainedModel, batch: int, prompt: int, new: int, way: Way, profile: Path | None
) -> Measured:
    """One model at one batch; ``new`` = 0 leaves the rate unmeasured, and nothing is compiled."""
    ids = torch.randint(model.config.vocab_size, (batch, prompt), device=model.device)
    decoder = Decoder(model, Shape(batch, -(-(prompt + new) // 256) * 256), way)
    first = first_token(decoder, ids)
    speed, setup = rate(decoder, ids, new) if new else (None, None)
    if profile is not None:
        profile.mkdir(parents=True, exist_ok=True)
        (profile / f"{name}-{batch}-{prompt}.txt").write_text(profiled(decoder, ids, new), encoding="utf-8")
    del decoder
    gc.collect()
    torch.compiler.reset()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return Measured(name, batch, prompt, first, speed, setup, gibibytes(model))


def table(rows: list[Measured]) -> str:
    """Markdown; ratios are against the float16 row of the same batch and prompt."""
    lines = [
        "| model | batch | prompt | first token, ms | × fp16 | tokens/s | × fp16 | weights, GiB | × fp16 | setup, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    full = {(row.batch, row.prompt): row for row in rows if row.model == FULL}
    for row in rows:
        base = full.get((row.batch, row.prompt))
        cells = [row.model, str(row.batch), str(row.prompt), f"{row.first_ms:.1f}"]
        cells.append(f"{base.first_ms / row.first_ms:.2f}" if base else "–")
        cells.append(f"{row.rate:.0f}" if row.rate else "–")
        cells.append(f"{row.rate / base.rate:.2f}" if row.rate and base and base.rate else "–")
        cells += [f"{row.weights_gib:.2f}", f"{row.weights_gib / base.weights_gib:.2f}" if base else "–"]
        cells.append(f"{row.setup_s:.0f}" if row.setup_s else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, for a quick look")
    parser.add_argument(
        "--schemes", nargs="+", default=["w4a16g128sym", "w4a8sym", f"w4a4sym{ONLINE}"],
        help=f"behind {ONLINE}, what linears read is multiplied by Kronecker products",
    )  # fmt: skip
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt where rates are measured")
    parser.add_argument("--long", type=int, default=2048, help="tokens of the prompt whose first token alone is timed")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--way", choices=["compiled", "recorded", "plain"], default="compiled", help="on a GPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", type=Path, help="directory for tables of what each measurement spent its time on")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--out", type=Path, help="JSON, written after every measurement")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Measures and prints."""
    given, began = arguments(), time.perf_counter()
    device, gpu = torch.device(given.device), given.device.startswith("cuda")
    shape = {**SHAPES[given.shape], **({"num_hidden_layers": given.layers} if given.layers else {})}
    config = LlamaConfig(max_position_embeddings=4096, **shape)
    full = full_model(config, device, torch.float16 if gpu else torch.float32)
    models = {FULL: full}
    notes = {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "torch": torch.__version__,
        "shape": shape,
        "way": given.way,
    }
    for name in given.schemes:
        scheme = Scheme.parse(name.removesuffix(ONLINE))
        packed, inputs = packed_model(full, scheme, name.endswith(ONLINE))
        error, far = difference(full, packed, inputs), tolerance(scheme)
        notes[f"{name}: difference"] = error
        print(f"{name}: answers differ by {error:.1e} ({'in' if error <= far else 'OUT OF'} tolerance {far}); "
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        if error <= far:
            models[name] = packed
    rows: list[Measured] = []
    plan = [(1, given.long, 0)] + [(batch, given.prompt, given.new) for batch in given.batches]
    for batch, prompt, new in plan:
        for name, model in models.items():
            if time.perf_counter() - began > given.seconds:
                print(
                    f"not measured, {given.seconds:.0f} s are over: {name}, batch {batch}, prompt {prompt}", flush=True
                )
                continue
            rows.append(measure(name, model, batch, prompt, new, given.way if gpu else "plain", given.profile))
            print(f"{asdict(rows[-1])} ({time.perf_counter() - began:.0f} s)", flush=True)
            if given.out is not None:
                content = {**notes, "rows": [asdict(row) for row in rows]}
                given.out.write_text(json.dumps(content, indent=2))
    print(f"\n{notes}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
