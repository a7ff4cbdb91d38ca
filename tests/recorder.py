"""CUDA graphs, without a GPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Recorder:
    """What a CUDA graph does, without one: recording runs nothing, a replay does the same work on the same tensors."""

    made: list[Recorder] = []

    def __init__(self, work: Callable[[], Tensor | None], warm_up: int) -> None:
        for _ in range(warm_up):
            work()
        self.work, self.replays = work, 0
        Recorder.made.append(self)

    def replay(self) -> Tensor | None:
        self.replays += 1
        return self.work()
