"""OpenAI's own client talks to ``train.py serve`` over loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from helpers import ROOT, tiny_llama, word_tokenizer

from aq_lightning.cli import main

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

SAID = [{"role": "user", "content": "word3 word14 word15"}]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ message.content }} {% endfor %}"
)


class Served:
    """A running server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

    def chat(self, **options: object):
        options = {"model": "tiny", "messages": SAID, "temperature": 0, "max_tokens": 8, **options}
        return self.client.chat.completions.create(**options)

    def requests(self) -> int:
        with urlopen(f"{self.url}/health", timeout=20) as answer:
            return json.load(answer)["requests"]

    def wait_until(self, requests: int) -> None:
        until = time.monotonic() + 20
        while (found := self.requests()) != requests:
            assert time.monotonic() < until, f"{found} requests instead of {requests}"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of long breath, which no token ends."""
    directory = tmp_path_factory.mktemp("served") / "tiny"
    tiny_llama(max_position_embeddings=4096, eos_token_id=None).save_pretrained(directory)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@contextmanager
def serving(directory: Path) -> Iterator[Served]:
    """A server in a process of its own, which ends within seconds of being told to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "train.py", "serve", f"--model={directory}", f"--port={port}", "--places=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as server:
        said = []
        while "Uvicorn running" not in "".join(said[-1:]) and (line := server.stderr.readline()):
            said.append(line)
        assert server.poll() is None, "".join(said)
        threading.Thread(target=server.stderr.read, daemon=True).start()
        running = Served(f"http://127.0.0.1:{port}")
        with running.client:
            yield running
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) in (0, -signal.SIGTERM)


@pytest.fixture(scope="module")
def served(directory: Path) -> Iterator[Served]:
    with serving(directory) as running:
        yield running


def test_the_model_is_listed(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["tiny"]


def test_streamed_and_whole_answers_are_the_same(served: Served) -> None:
    whole = served.chat()
    assert len(whole.choices[0].message.content.split()) == 8 and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 8)
    chunks = list(served.chat(stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].usage == whole.usage and len({chunk.id for chunk in chunks}) == 1


def test_a_text_is_continued(served: Served) -> None:
    options = {"model": "tiny", "prompt": "word3 word14 word15", "temperature": 0, "max_tokens": 6}
    whole = served.client.completions.create(**options).choices[0].text
    streamed = served.client.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole and len(whole.split()) == 6


def test_it_stops_before_what_it_is_told(served: Served) -> None:
    text = served.chat().choices[0].message.content
    words = text.split()
    answer = served.chat(stop=["never", words[3] + " " + words[4]]).choices[0]
    assert answer.message.content == text[: text.index(words[3] + " " + words[4])] and answer.finish_reason == "stop"


def test_draws_follow_the_seed(served: Served) -> None:
    said = [served.chat(temperature=1.5, seed=seed, max_tokens=20).choices[0].message.content for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"model": "other"}, openai.NotFoundError, "has the model 'tiny', got 'other'"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "poet", "content": "a"}]}, openai.BadRequestError, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, openai.BadRequestError, "content"),
        ({"messages": [{"role": "system", "content": "a"}]}, openai.BadRequestError, "no system here"),
        ({"messages": [{"role": "user", "content": "word1 " * 5000}]}, openai.BadRequestError, "4096 tokens together"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"n": 2}, openai.BadRequestError, "n is not supported"),
        ({"logprobs": True}, openai.BadRequestError, "logprobs is not supported"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools is not supported"),
        ({"extra_body": {"beam": 4}}, openai.BadRequestError, "beam"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_refused_with_a_reason(
    served: Served, options: dict[str, object], error: type, message: str, stream: bool
) -> None:
    with pytest.raises(error, match=message):
        served.chat(stream=stream, **options)
    assert served.requests() == 0


def test_what_is_no_json_is_refused(served: Served) -> None:
    url, headers = f"{served.url}/v1/chat/completions", {"Content-Type": "application/json"}
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(url, b"{", headers), timeout=20)
    with refused.value as answer:
        assert answer.code == 400 and "JSON" in json.load(answer)["error"]["message"]


def test_a_client_that_leaves_a_stream_frees_its_place(served: Served) -> None:
    with served.chat(stream=True, max_tokens=4000) as stream:
        assert [next(stream).choices[0].delta.content for _ in range(3)][0] == "" and served.requests() == 1
    served.wait_until(requests=0)


def test_a_client_that_stops_waiting_for_a_whole_answer_frees_its_place(served: Served) -> None:
    with pytest.raises(openai.APITimeoutError):
        served.client.with_options(timeout=1).chat.completions.create(model="tiny", messages=SAID, temperature=0)
    served.wait_until(requests=0)


def test_who_comes_when_all_places_are_taken_is_turned_away(served: Served) -> None:
    with served.chat(stream=True, max_tokens=4000) as first:
        next(first)
        with served.chat(stream=True, max_tokens=4000):
            served.wait_until(requests=2)
            with pytest.raises(openai.RateLimitError, match="2 requests wait already"):
                served.chat()
        served.wait_until(requests=1)  # who only waited leaves too
        assert next(first).choices[0].delta.content
    served.wait_until(requests=0)
    assert served.chat().choices[0].finish_reason == "length"


def test_of_many_who_come_at_once_no_more_are_let_in_than_there_are_places(served: Served) -> None:
    turned_away: list[bool] = []

    def ask() -> None:
        try:
            served.chat(max_tokens=4)
        except openai.RateLimitError:
            turned_away.append(True)

    with served.chat(stream=True, max_tokens=4000) as first:
        next(first)
        asking = [threading.Thread(target=ask) for _ in range(6)]
        for each in asking:
            each.start()
        until = time.monotonic() + 20
        while len(turned_away) < 5 and time.monotonic() < until:
            assert served.requests() <= 2
            time.sleep(0.05)
    for each in asking:
        each.join(20)
    assert len(turned_away) == 5 and served.requests() == 0


def test_a_client_that_gives_up_in_the_queue_frees_its_place(served: Served) -> None:
    with served.chat(stream=True, max_tokens=4000) as first:
        next(first)
        impatient = served.client.with_options(timeout=1)
        with pytest.raises(openai.APITimeoutError):
            impatient.chat.completions.create(model="tiny", messages=SAID, temperature=0)
        served.wait_until(requests=1)
        assert next(first).choices[0].delta.content
    served.wait_until(requests=0)


def test_without_its_packages_serve_says_what_to_install(
    model_directory: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as stop:
        main(["serve", f"--model={model_directory}"])
    assert stop.value.code == 2 and "aq-lightning[serve]" in capsys.readouterr().err


def test_it_ends_when_told_to_whoever_is_listening(directory: Path) -> None:
    with serving(directory) as other:
        stream = other.chat(stream=True, max_tokens=4000)
        next(stream)
    stream.close()
