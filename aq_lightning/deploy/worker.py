"""One thread that generates, for many clients who wait."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

from aq_lightning.deploy.generation import Generator, Limits, Piece


class Worker:
    """Answers requests one after another; whoever goes away gives up the place, waiting or being answered.

    Args:
        generator: used by this thread alone, for recorded steps belong to the thread that recorded them.
        places: requests at most, the one at work included.
    """

    def __init__(self, generator: Generator, places: int) -> None:
        self._generator, self._places = generator, places
        self._thread = ThreadPoolExecutor(1, "generation")
        self._leaving: set[threading.Event] = set()

    @property
    def taken(self) -> int:
        """Requests that wait or are being answered."""
        return len(self._leaving)

    @property
    def full(self) -> bool:
        """Whether another request must be turned away."""
        return self.taken >= self._places

    async def run(self, *arguments: Any) -> Any:
        """Calls ``arguments[0]`` with the others on the thread, behind those who wait."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, *arguments)

    def pieces(self, prompt: str | list[dict[str, str]], limits: Limits) -> AsyncGenerator[Piece, None]:
        """The answer as it comes, behind those of who came before; the place is taken now.

        Close the iterator, or drop it, to give up the place.
        """
        left = threading.Event()
        self._leaving.add(left)
        answer = self._answer(prompt, limits, left)
        weakref.finalize(answer, self._leaving.discard, left)  # one that nobody began to read has nothing to close
        return answer

    async def _answer(
        self, prompt: str | list[dict[str, str]], limits: Limits, left: threading.Event
    ) -> AsyncGenerator[Piece, None]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Piece | None] = asyncio.Queue()

        def put(piece: Piece | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server is going down
                loop.call_soon_threadsafe(queue.put_nowait, piece)

        def work() -> None:
            for pieces in () if left.is_set() else self._generator.stream([prompt], limits):
                if left.is_set():
                    return
                put(pieces[0])

        answering = self._thread.submit(work)
        answering.add_done_callback(lambda _: put(None))
        try:
            while (piece := await queue.get()) is not None:
                yield piece
            answering.result()  # raises what went wrong
        finally:
            left.set()
            self._leaving.discard(left)

    def close(self) -> None:
        """Ends the answer at work and all that wait."""
        for left in list(self._leaving):
            left.set()
        self._thread.shutdown(wait=True, cancel_futures=True)


async def until(pieces: AsyncGenerator[Piece, None], stops: list[str]) -> AsyncGenerator[Piece, None]:
    """Pieces up to the first of several texts, which is left out; text that may begin one is held back."""
    held = ""
    async with aclosing(pieces):
        async for piece in pieces:
            held += piece.text
            ends = [place for place in map(held.find, stops) if place >= 0]
            if ends:
                yield replace(piece, text=held[: min(ends)], ended="stop")
                return
            keep = 0 if piece.ended else max((_overlap(held, stop) for stop in stops), default=0)
            said, held = held[: len(held) - keep], held[len(held) - keep :]
            yield replace(piece, text=said)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that begins a stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
