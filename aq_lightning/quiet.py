"""What a user of this program does not have to read: messages that say nothing, and tracebacks."""

from __future__ import annotations

import logging
import sys
import warnings


def quiet() -> None:
    """Silences what Lightning says once per Trainer, of which there is one per block."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*Checkpoint directory .* exists.*",
        ".*LeafSpec.*",
        ".*sync_dist=True.*",  # of several processes: what is logged is the same in all
        ".*args parameter is intended to run from within Python.*",  # verbs and options of our own come first
        ".*module\\(s\\) in eval mode at the start of training.*",  # frozen blocks belong in eval mode
    ):
        warnings.filterwarnings("ignore", message)


def unforeseen(kind: type[BaseException], error: BaseException, _: object) -> None:
    """A :data:`sys.excepthook` for faults of the program itself: one sentence; Python ends with exit code 1."""
    said = str(error).strip().splitlines()
    sys.stderr.write(
        f"error: {kind.__name__}{f': {said[0]}' if said else ''}. This should not happen: add --debug to the command "
        "for the traceback, and report it.\n"
    )
