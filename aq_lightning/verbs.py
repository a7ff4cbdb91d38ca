"""Plain verbs of the command line: they fit nothing, and ask only for what they use."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from aq_lightning.conversion import convert
from aq_lightning.deploy import Generator
from aq_lightning.deploy import load as load_to_run
from aq_lightning.doctor import examine
from aq_lightning.durable import write_text
from aq_lightning.errors import RequestError
from aq_lightning.export import formats
from aq_lightning.kernels.layout import Layout
from aq_lightning.models.loading import EMBEDDED, load
from aq_lightning.report import REPORT, Record, page
from aq_lightning.status import status_of
from aq_lightning.summary import program


def doctor(model: str = EMBEDDED, trust_remote_code: bool = False) -> int:
    """Prints what folds at each site of a model and the measured float64 error of every transform, with random
    parameters, on its first block.

    Args:
        model: directory with safetensors or GGUF, hub id, or ``embedded``.
        trust_remote_code: whether code from the hub may run.

    Returns:
        Exit code: 0 if every transform is exact, 1 otherwise.

    Raises:
        RequestError: the model or its architecture is not known.
    """
    pretrained = load(model, trust_remote_code)
    print(f"{pretrained.model.config.model_type}: {len(pretrained.blocks)} blocks, {pretrained.heads}")
    findings = []
    for finding in examine(pretrained):
        print(finding, flush=True)
        findings.append(finding)
    wrong = [finding for finding in findings if not finding.exact and not finding.refusal]
    print(f"{len(wrong)} of {len(findings)} are NOT EXACT" if wrong else "everything that folds is exact")
    return 1 if wrong else 0


def export(
    run: Path,
    format: formats.Name,
    out: Path | None = None,
    layout: Layout | None = None,
    shard_gib: float = 4.0,
) -> int:
    """Writes the model of a finished run in another format, and checks it before it takes its name.

    Args:
        run: directory of a finished `fit`.
        format: of the result; docs/deploy.md says which engine loads which.
        out: directory to make; RUN/<format> unless told.
        layout: how words are filled, for compressed-tensors with 3, 5, 6 or 7 bits.
        shard_gib: greatest size of a file of tensors.

    Returns:
        Exit code.

    Raises:
        RequestError: there is no checkpoint, or the format cannot hold it.
        ParityError: the result does not say what the checkpoint says.
    """
    if not 0 < shard_gib < math.inf:
        raise RequestError(f"A file of tensors has a positive size, got {shard_gib}: set --shard_gib to 4.")
    directory, verdict = convert(run, format, out, layout, int(shard_gib * 2**30))
    print(f"{format}: {directory}\nchecked: {verdict}")
    return 0


def status(run: str) -> int:
    """Prints where a run stands: what is done, what is at work, and how much time is left.

    Args:
        run: the run's directory.

    Returns:
        Exit code 0.

    Raises:
        RequestError: no run is there.
    """
    print(status_of(Path(run)))
    return 0


def report(arguments: list[str]) -> int:
    """Writes one page about one run or several: ``report RUN [RUN …] [--out FILE]``.

    Args:
        arguments: of the command line; of one run, the page goes into its directory.

    Returns:
        Exit code 0.

    Raises:
        RequestError: a run is not there, or matplotlib is not installed.
    """
    parser = ArgumentParser(prog=f"{program()} report", description="One page about one run, or several side by side.")
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs, finished or not")
    parser.add_argument("--out", type=Path | None, default=None, help="RUN/report.html or report.html unless told")
    given = parser.parse_args(arguments)
    beside = given.runs[0] / REPORT if len(given.runs) == 1 else Path(REPORT)
    out = beside if given.out is None else given.out
    write_text(out, page([Record(run) for run in given.runs]))
    print(f"report: {out}")
    return 0


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    length: int = 4096,
    places: int = 64,
    name: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Answers requests in OpenAI's form (chat/completions, completions, models), on a GPU if there is one.

    Args:
        model: quantized or not: directory with safetensors or GGUF, hub id, or ``embedded``.
        host: address to listen at; there are no keys, so 0.0.0.0 lets in whoever reaches it.
        port: to listen at.
        length: tokens of prompt and answer at most, for which memory is taken at once.
        places: requests at most that wait or are being answered; more are turned away.
        name: under which clients ask for the model; the last part of its path unless told.
        trust_remote_code: whether code from the hub may run.

    Returns:
        Exit code 0, when it is told to end.

    Raises:
        RequestError: the model is not known, or the server's packages are not installed.
    """
    if length < 16 or places < 1:
        raise RequestError(f"A server has 16 tokens and 1 place or more, got --length {length} --places {places}.")
    try:
        import uvicorn

        from aq_lightning.deploy.server import application
    except ImportError as error:
        raise RequestError(
            f'The server needs packages of its own: pip install "aq-lightning[serve]" ({error}).'
        ) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = Generator(*load_to_run(model, device, trust_remote_code), length=length)
    served = name or Path(model).name
    print(f"model {served} on {device}; POST http://{host}:{port}/v1/chat/completions", flush=True)
    app = application(generator, served, places)
    uvicorn.run(app, host=host, port=port, log_level="info", access_log=False, timeout_graceful_shutdown=5)
    return 0


VERBS: dict[str, Callable[..., int]] = {"doctor": doctor, "export": export, "serve": serve, "status": status}
"""Name on the command line → function; its answer is the exit code."""
BY_NAME = {"export", "serve"}
"""Verbs whose required arguments have names on the command line."""

_FITTING = {
    "fit": "Calibrates a model: --config METHOD --model.pretrained MODEL --model.scheme w4a16g128 --out RUN.",
    "plan": "Prints what that would do and cost; it takes the arguments of fit.",
    "test": "Scores any model: --model.pretrained MODEL --data.source wikitext2.",
    "predict": "Answers prompts: --model.pretrained MODEL --prompt TEXT.",
    "report": "Writes one page about one run or several: RUN [RUN …].",
}


def overview(program: str) -> str:
    """Every verb with a sentence; a plain one's is the first of its docstring.

    Args:
        program: how it is called.
    """
    said = {verb: " ".join(str(function.__doc__).split()).partition(". ")[0] for verb, function in VERBS.items()}
    lines = [f"  {verb:<8} {sentence.rstrip('.')}" for verb, sentence in (_FITTING | said).items()]
    ends = [f"{program} VERB --help says more; --debug shows tracebacks."]
    return "\n".join([f"usage: {program} VERB [arguments]", *lines, *ends])
