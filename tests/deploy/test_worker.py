"""The queue before the one thread that generates."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from types import SimpleNamespace

from aq_lightning.deploy.generation import Limits, Piece
from aq_lightning.deploy.worker import Worker


class Reader:
    """Stands for a generator that answers each prompt with its own words, when it is let."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go = threading.Event()

    def stream(self, prompts: list[str], limits: Limits) -> Iterator[list[Piece]]:
        self.begun.append(prompts[0])
        for word in prompts[0].split():
            assert self.go.wait(20)
            yield [Piece(word, 1, None)]


async def read(pieces: object) -> str:
    return " ".join([piece.text async for piece in pieces])


def test_requests_are_answered_in_the_order_of_their_coming_whatever_their_length() -> None:
    reader = Reader()

    async def clients() -> list[str]:
        worker = Worker(reader, places=8)
        asked = [f"{number} " * (9 - number) for number in range(8)]
        answers = [asyncio.ensure_future(read(worker.pieces(each, Limits(9)))) for each in asked]
        assert worker.full and worker.taken == 8
        await asyncio.sleep(0)  # all stand in the queue
        reader.go.set()
        found = await asyncio.gather(*answers)
        assert worker.taken == 0
        worker.close()
        return found

    found = asyncio.run(clients())
    assert found == [each.strip() for each in reader.begun]
    assert [int(each[0]) for each in reader.begun] == list(range(8))


def test_who_leaves_the_queue_is_never_answered() -> None:
    reader = Reader()

    async def clients() -> None:
        worker = Worker(reader, places=3)
        first, second, third = (
            asyncio.ensure_future(read(worker.pieces(name, Limits(9)))) for name in ("first", "second", "third")
        )
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.wait({second})
        assert worker.taken == 2 and not worker.full
        reader.go.set()
        assert [await first, await third] == ["first", "third"]
        worker.close()

    asyncio.run(clients())
    assert reader.begun == ["first", "third"]


def test_a_place_is_taken_at_once_and_given_up_by_who_never_listens() -> None:
    worker = Worker(SimpleNamespace(), places=1)
    pieces = worker.pieces("a", Limits(9))
    assert worker.full
    del pieces
    gc.collect()
    assert not worker.full
    worker.close()
