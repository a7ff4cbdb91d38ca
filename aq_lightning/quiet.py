"""Messages that say nothing to a user of this program."""

from __future__ import annotations

import logging
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
        ".*module\\(s\\) in eval mode at the start of training.*",  # frozen blocks belong in eval mode
    ):
        warnings.filterwarnings("ignore", message)
