"""The one exception users are meant to read."""

from __future__ import annotations


class RequestError(ValueError):
    """A request that cannot be granted: says which invariant fails, what was received, and the fix.

    Raised before anything is written. The command line prints its message without a traceback and exits with 2.
    """
