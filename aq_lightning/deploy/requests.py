"""What clients of OpenAI's interface send, and what of it is understood; everything else is refused by name."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aq_lightning.deploy.decoding import Sampling
from aq_lightning.deploy.generation import Limits

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False, 0), "top_logprobs": (0,), "echo": (False,), "suffix": ("",),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],), "store": (False,),
    "response_format": ({"type": "text"},), "tool_choice": ("none",), "parallel_tool_calls": (True, False),
}  # fmt: skip
"""Fields that are not understood → values that ask for nothing; None always is one."""
_IGNORED = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")


class StreamOptions(BaseModel):
    """What a stream ends with."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Request(BaseModel):
    """Fields of both endpoints."""

    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def only_what_is_understood(cls, body: Any) -> Any:
        """Drops fields that ask for nothing, and refuses those that ask for what there is not."""
        if not isinstance(body, dict):
            return body
        kept = {name: value for name, value in body.items() if name not in _IGNORED}
        for name, neutral in _NEUTRAL.items():
            value = kept.pop(name, None)
            if value is not None and value not in neutral:
                raise ValueError(f"{name} is not supported: leave it out")
        return kept

    def limits(self, room: int) -> Limits:
        """Of the answer, which may have so many tokens; draws are at temperature 1 unless told, as OpenAI's are."""
        temperature = 1.0 if self.temperature is None else self.temperature
        sampling = Sampling(temperature, 1.0 if self.top_p is None else self.top_p)
        return Limits(min(self.wanted or room, room), sampling, self.seed)

    @property
    def wanted(self) -> int | None:
        """Tokens of the answer at most, where the client says so."""
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        """Texts before which the answer ends."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in given if stop]


class CompletionRequest(Request):
    """A text to go on with."""

    prompt: str

    @property
    def asked(self) -> str:
        """The prompt."""
        return self.prompt


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Request):
    """A conversation to answer."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def wanted(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def asked(self) -> list[dict[str, str]]:
        """The conversation."""
        return [message.plain() for message in self.messages]
