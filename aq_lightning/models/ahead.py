"""Reading ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def read_ahead(read: Callable[[Key], Value], keys: Iterable[Key]) -> Iterator[Value]:
    """``read(key)`` for each key in order; while a value is in use, a thread reads the next, and no further one."""
    pending: deque[Future[Value]] = deque()
    with ThreadPoolExecutor(1) as reader:
        for key in keys:
            pending.append(reader.submit(read, key))
            if len(pending) > 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
