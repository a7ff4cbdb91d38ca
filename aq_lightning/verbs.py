"""Plain verbs of the command line: they fit nothing, and ask only for what they use."""

from __future__ import annotations

from pathlib import Path

from aq_lightning.doctor import examine
from aq_lightning.models.loading import EMBEDDED, load
from aq_lightning.status import status_of


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


VERBS = {"doctor": doctor, "status": status}
"""Name on the command line → function; its answer is the exit code."""
