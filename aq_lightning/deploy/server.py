"""OpenAI's interface to one model: ``/v1/chat/completions``, ``/v1/completions``, ``/v1/models``, ``/health``.

Requests are answered one after another (:class:`~aq_lightning.deploy.worker.Worker`). Errors have OpenAI's form,
``{"error": {"message", "type", "param", "code"}}``: 400 for what is asked wrongly, 404 for another model, 429 when too
many wait.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse

from aq_lightning.deploy.generation import Generator, Limits, Piece
from aq_lightning.deploy.requests import ChatRequest, CompletionRequest
from aq_lightning.deploy.worker import Worker, until
from aq_lightning.errors import RequestError

_CHAT, _TEXT = ("chat.completion", "chatcmpl"), ("text_completion", "cmpl")
_PATIENCE = 0.25  # seconds between looks whether a client is still there


class Service:
    """The endpoints.

    Args:
        generator: of the model, with a fixed length.
        name: under which clients ask for it.
        places: requests at most that wait or are being answered.
    """

    def __init__(self, generator: Generator, name: str, places: int) -> None:
        self._generator, self._name = generator, name
        self._worker = Worker(generator, places)
        self._began = int(time.time())

    @asynccontextmanager
    async def life(self, _: fastapi.FastAPI) -> AsyncIterator[None]:
        """From the first recorded step to the last client."""
        await self._worker.run(self._generator.generate, ["a"], Limits(3))
        yield
        self._worker.close()

    def models(self) -> dict[str, Any]:
        """The one model."""
        card = {"id": self._name, "object": "model", "created": self._began, "owned_by": "aq_lightning"}
        return {"object": "list", "data": [card]}

    def health(self) -> dict[str, Any]:
        """That it lives, and how many requests wait or are being answered."""
        return {"status": "ok", "requests": self._worker.taken}

    async def chat(self, body: ChatRequest, request: fastapi.Request) -> Response:
        """Answers a conversation."""
        return await self._answer(body, request, _Shape(*_CHAT, self._name))

    async def complete(self, body: CompletionRequest, request: fastapi.Request) -> Response:
        """Goes on with a text."""
        return await self._answer(body, request, _Shape(*_TEXT, self._name))

    async def _answer(self, body: ChatRequest | CompletionRequest, request: fastapi.Request, shape: _Shape) -> Response:
        if body.model != self._name:
            return refusal(404, f"This server has the model {self._name!r}, got {body.model!r}: ask for that.", "model")
        if self._worker.full:
            return refusal(429, f"{self._worker.taken} requests wait already: try again later.")
        used = len(self._generator.encode(body.asked))
        limits = body.limits(self._generator.room(used))
        pieces = until(self._worker.pieces(body.asked, limits), body.stops)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(shape.stream(pieces, used if usage else None), media_type="text/event-stream")
        whole = asyncio.ensure_future(_collected(pieces))
        while not (await asyncio.wait({whole}, timeout=_PATIENCE))[0]:
            if await request.is_disconnected():
                whole.cancel()
                await asyncio.wait({whole})
                return Response(status_code=499)  # which nobody reads
        return JSONResponse(shape.whole(*whole.result(), used))


async def _collected(pieces: AsyncGenerator[Piece, None]) -> tuple[str, Piece]:
    """The text of all pieces, and the last of them."""
    text, last = "", Piece("", 0, None)
    async with aclosing(pieces):
        async for last in pieces:
            text += last.text
    return text, last


class _Shape:
    """The JSON of one answer."""

    def __init__(self, kind: str, prefix: str, model: str) -> None:
        self._chat = kind == _CHAT[0]
        self._kind = kind
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, last: Piece, used: int) -> dict[str, Any]:
        """An answer at once."""
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "finish_reason": last.ended, "logprobs": None}
        return {**self._head, "object": self._kind, "choices": [choice], "usage": _usage(used, last.tokens)}

    async def stream(self, pieces: AsyncGenerator[Piece, None], used: int | None) -> AsyncIterator[str]:
        """Server-sent events; with the count of the prompt's tokens, the last tells how many there were."""
        if self._chat:
            yield self._event({"role": "assistant", "content": ""}, None)
        last = Piece("", 0, None)
        try:
            async with aclosing(pieces):
                async for last in pieces:
                    if last.text or last.ended:
                        yield self._event({"content": last.text}, last.ended)
        except RuntimeError as error:  # torch's too; the status is long sent
            yield _event({"error": _error(f"The answer broke off: {error}", "server_error")})
            return
        if used is not None:
            yield _event({**self._head, "object": self._object, "choices": [], "usage": _usage(used, last.tokens)})
        yield "data: [DONE]\n\n"

    @property
    def _object(self) -> str:
        return f"{self._kind}.chunk" if self._chat else self._kind

    def _event(self, delta: dict[str, str], ended: str | None) -> str:
        said = {"delta": delta} if self._chat else {"text": delta["content"]}
        choice = {"index": 0, **said, "finish_reason": ended, "logprobs": None}
        return _event({**self._head, "object": self._object, "choices": [choice]})


def application(generator: Generator, name: str, places: int) -> fastapi.FastAPI:
    """The server of one model."""
    service = Service(generator, name, places)
    app = fastapi.FastAPI(lifespan=service.life, title=f"{name} on aq_lightning")
    app.get("/v1/models")(service.models)
    app.get("/health")(service.health)
    app.post("/v1/chat/completions", response_model=None)(service.chat)
    app.post("/v1/completions", response_model=None)(service.complete)
    app.exception_handler(RequestError)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    return app


def refusal(status: int, message: str, param: str | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse({"error": _error(message, "invalid_request_error", param)}, status)


async def _refused(_: fastapi.Request, error: RequestError) -> JSONResponse:
    return refusal(400, str(error))


async def _invalid(_: fastapi.Request, error: RequestValidationError) -> JSONResponse:
    found = error.errors()[0]
    place = ".".join(str(part) for part in found["loc"] if part != "body")
    return refusal(400, f"{place}: {found['msg']}".removeprefix(": "), place or None)


def _error(message: str, kind: str, param: str | None = None) -> dict[str, str | None]:
    return {"message": message, "type": kind, "param": param, "code": None}


def _usage(used: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": used, "completion_tokens": made, "total_tokens": used + made}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
