"""Generation with packed weights against the same model in float16: tokens per second, time to the first.

Weights are random, in the shape of a well-known model, rounded to nearest; the float16 model has the same rounded
weights. Both run through the same static key–value cache, torch.compile and CUDA graph
(``aq_lightning.deploy.Generator``); the float16 model is transformers' own, with its linears as they are. Packed logits
must be near the float16 ones before anything is timed. Results are written after every measurement, and no measurement
begins once ``--seconds`` have passed.

    python benchmarks/generation.py --out generation.json
    python benchmarks/generation.py --shape tiny --device cpu --seconds 60
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from aq_lightning.deploy import Int4Linear, fuse
from aq_lightning.deploy.decoding import Decoder, Sampling, Shape, Way
from aq_lightning.qtensor import QTensor, encode, grid_of
from aq_lightning.scheme import Scheme

SHAPES = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
}  # fmt: skip
REPETITIONS = 5
FAR = 3e-2
"""Greatest relative difference of logits where activations are not rounded."""
FAR_ROUNDED = 0.3
"""Where they are, which the float16 model's are not."""
FULL = "fp16"


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


def packed_model(full: PreTrainedModel, scheme: Scheme) -> PreTrainedModel:
    """The model with packed linears, all else shared; the full one gets the rounded weights."""
    with torch.device("meta"):
        packed = AutoModelForCausalLM.from_config(full.config, dtype=full.dtype).eval()
    for path, module in full.named_modules():
        if isinstance(module, nn.Linear) and path.startswith("model.layers."):
            weight = rounded(module.weight, scheme)
            module.weight.copy_(weight.dequantize(torch.float32))
            packed.set_submodule(path, Int4Linear.of(weight, scheme))
    for name, tensor in [*full.named_parameters(), *full.named_buffers()]:
        parent, _, leaf = name.rpartition(".")
        if not isinstance(packed.get_submodule(parent), Int4Linear):
            setattr(packed.get_submodule(parent), leaf, tensor)
    return fuse(packed.requires_grad_(False))


def gibibytes(model: nn.Module) -> float:
    """Of parameters and buffers."""
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()}) / 2**30


@torch.no_grad()
def difference(full: PreTrainedModel, packed: PreTrainedModel) -> float:
    """Relative difference of logits, of a prompt long enough for one kernel and short enough for another."""
    ids = torch.randint(full.config.vocab_size, (1, 80), device=full.device)
    errors = []
    for tokens in (ids, ids[:, :1]):
        expected, actual = full(tokens).logits.float(), packed(tokens).logits.float()
        errors.append(float((actual - expected).norm() / expected.norm()))
    return max(error if error == error else float("inf") for error in errors)


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


def measure(name: str, model: PreTrainedModel, batch: int, prompt: int, new: int, way: Way) -> Measured:
    """One model at one batch; ``new`` = 0 leaves the rate unmeasured, and nothing is compiled."""
    ids = torch.randint(model.config.vocab_size, (batch, prompt), device=model.device)
    decoder = Decoder(model, Shape(batch, -(-(prompt + new) // 256) * 256), way)
    first = first_token(decoder, ids)
    speed, setup = rate(decoder, ids, new) if new else (None, None)
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
    parser.add_argument("--schemes", nargs="+", default=["w4a16g128sym", "w4a8sym"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt where rates are measured")
    parser.add_argument("--long", type=int, default=2048, help="tokens of the prompt whose first token alone is timed")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--way", choices=["compiled", "recorded", "plain"], default="compiled", help="on a GPU")
    parser.add_argument("--device", default="cuda")
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
        scheme = Scheme.parse(name)
        packed = packed_model(full, scheme)
        error, far = difference(full, packed), FAR if scheme.activation is None else FAR_ROUNDED
        notes[f"{name}: difference of logits"] = error
        print(f"{name}: logits differ by {error:.1e} ({'in' if error <= far else 'OUT OF'} tolerance {far}); "
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
            rows.append(measure(name, model, batch, prompt, new, given.way if gpu else "plain"))
            print(f"{asdict(rows[-1])} ({time.perf_counter() - began:.0f} s)", flush=True)
            if given.out is not None:
                content = {**notes, "rows": [asdict(row) for row in rows]}
                given.out.write_text(json.dumps(content, indent=2))
    print(f"\n{notes}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
