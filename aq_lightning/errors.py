"""The exceptions that users are meant to read."""

from __future__ import annotations


class RequestError(ValueError):
    """A request that cannot be granted: says which invariant fails, what was received, and the fix.

    Raised before anything is written. The command line prints its message without a traceback and exits with 2.
    """


class ParityError(RuntimeError):
    """A written checkpoint does not say what the quantized model says: names the first differences and where it lies.

    The files stay where they were written, beside the place that they would have taken.
    """


class Interrupted(Exception):
    """A run that stopped before its end, with everything finished so far on the disk: the same command goes on.

    The command line prints its message without a traceback and exits with 75 (``EX_TEMPFAIL``), whereupon a scheduler
    may give the command again.
    """
