"""Generated tokens are those of transformers' own ``generate``, alone, in batches, and one after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_close, tiny_llama, word_tokenizer
from tiny import MODELS, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from aq_lightning import deploy
from aq_lightning.deploy import decoding
from aq_lightning.deploy.decoding import Decoder, Sampling, Shape
from aq_lightning.deploy.generation import Generator, Limits, _Answer
from aq_lightning.errors import RequestError

PROMPTS = ["word3 word14 word15 word9 word2", "word6", "word5 word35 word8"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    backend = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tokens_of_every_kind_of_model(name: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(name)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    ids = torch.randint(3, 96, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :1] = 0
    model.generation_config.eos_token_id = None  # of which generate pads what follows
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **options)
    decoder = Decoder(model, Shape(3, 32), "plain")
    for _ in range(2):  # nothing is left of the first
        answer = torch.stack(list(decoder.stream(ids, mask, 12, Sampling())), 1)
        assert torch.equal(answer, expected[:, 9:])
    alone = Decoder(model, Shape(1, 32), "plain")
    assert torch.equal(torch.stack(list(alone.stream(ids[:1], None, 12, Sampling())), 1), expected[:1, 9:])


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(tiny_llama(), word_tokenizer())


def test_a_batch_answers_as_each_prompt_alone(generator: Generator) -> None:
    limits = Limits(20)
    together = generator.generate(PROMPTS, limits)
    assert together == [generator.generate([prompt], limits)[0] for prompt in PROMPTS]
    assert all(len(text.split()) == 20 for text in together)


def test_streamed_pieces_are_the_text(generator: Generator) -> None:
    pieces = [pieces[0] for pieces in generator.stream(PROMPTS[:1], Limits(9))]
    assert [piece.tokens for piece in pieces] == list(range(1, 10))
    assert [piece.ended for piece in pieces] == [None] * 8 + ["length"]
    ids = generator.model.generate(
        torch.tensor([generator.encode(PROMPTS[0])]), max_new_tokens=9, do_sample=False, pad_token_id=0
    )
    assert "".join(piece.text for piece in pieces) == generator.tokenizer.decode(ids[0, 5:])


def test_characters_of_several_tokens_come_whole() -> None:
    """Bytes of a character are held back until it is complete."""
    tokenizer = byte_tokenizer()
    text = "naïve — 深い 🙂 done"
    answer = _Answer(tokenizer, set(), 100)
    tokens = tokenizer(text)["input_ids"]
    pieces = [answer.take(token).text for token in tokens]
    assert "".join(pieces) == text and "" in pieces and not any("\N{REPLACEMENT CHARACTER}" in each for each in pieces)


def test_an_end_token_ends_one_answer_and_not_the_others(generator: Generator) -> None:
    free = generator.generate(PROMPTS, Limits(20))
    words = [text.split() for text in free]
    end = next(word for word in words[0][3:] if all(word not in other for other in words[1:]))
    ending = Generator(generator.model, word_tokenizer())
    ending._ends = {generator.tokenizer.convert_tokens_to_ids(end)}
    assert [text.split() for text in ending.generate(PROMPTS, Limits(20))] == [
        words[0][: words[0].index(end)], *words[1:]
    ]  # fmt: skip
    (*_, last) = ending.stream(PROMPTS[:1], Limits(20))
    assert last[0].ended == "stop" and last[0].tokens == words[0].index(end)


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)
    probabilities = (logits[0] / 0.8).softmax(-1)
    drawn = Sampling(0.8).choose(logits).bincount(minlength=4) / 20000
    assert (drawn - probabilities).abs().max() < 0.02
    assert probabilities[0] < 0.8 < probabilities[:2].sum()
    nucleus = Sampling(0.8, 0.8).choose(logits).bincount(minlength=4) / 20000
    assert (nucleus[:2] - probabilities[:2] / probabilities[:2].sum()).abs().max() < 0.02 and not nucleus[2:].any()


def test_a_seed_repeats_an_answer(generator: Generator) -> None:
    def draw(seed: int) -> list[str]:
        return generator.generate(PROMPTS, Limits(12, Sampling(1.5, 0.9), seed))

    assert draw(3) == draw(3) != draw(4)


def test_an_answer_ends_where_the_model_does(generator: Generator) -> None:
    prompt = " ".join(["word1"] * 120)
    assert len(generator.generate([prompt], Limits(50))[0].split()) == 8  # of 128


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "at least one token"),
        (" ".join(["word1"] * 128), "have 128 tokens together, got a prompt of 128"),
        ([{"role": "user", "content": "word1"}], "chat template"),
    ],
)
def test_prompts_without_an_answer_are_refused(generator: Generator, prompt: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        generator.generate([prompt], Limits())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Limits(0), "max_new_tokens 0"),
        (lambda: Sampling(-1), "temperature"),
        (lambda: Sampling(float("nan")), "temperature"),
        (lambda: Sampling(1, 0), "top_p"),
    ],
)
def test_impossible_limits_are_refused(make, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()


def test_a_step_is_one_graph_for_torch_compile() -> None:
    model = tiny_llama()
    plain, compiled = (Decoder(model, Shape(2, 32), "plain") for _ in range(2))
    compiled._step = torch.compile(compiled._logits, fullgraph=True, dynamic=False, backend="aot_eager")
    ids = torch.randint(3, 96, (2, 9))
    for _ in range(2):
        assert all(map(torch.equal, plain.stream(ids, None, 8, Sampling()), compiled.stream(ids, None, 8, Sampling())))


def test_what_cannot_be_recorded_runs_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And from where it was, whatever the attempt has done to cache and position."""

    def refuse(work: Callable[[], torch.Tensor], warm_up: int) -> None:
        for _ in range(warm_up):
            work()
        raise RuntimeError("operation not permitted when stream is capturing\nand so on")

    monkeypatch.setattr(decoding, "Graph", refuse)
    model, ids = tiny_llama(), torch.randint(3, 96, (2, 9))
    plain, refused = (Decoder(model, Shape(2, 32), way) for way in ("plain", "recorded"))
    expected = list(plain.stream(ids, None, 12, Sampling()))
    with pytest.warns(UserWarning, match="one by one: operation not permitted when stream is capturing$"):
        assert all(map(torch.equal, expected, refused.stream(ids, None, 12, Sampling())))


def tokens(decoder: Decoder, prompt: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack(list(decoder.stream(prompt, None, count, Sampling())), 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a GPU")
def test_recorded_steps_answer_the_same() -> None:
    model = tiny_llama().cuda()
    ids = torch.randint(3, 96, (2, 9))
    plain, recorded, compiled = (Decoder(model, Shape(2, 32), way) for way in ("plain", "recorded", "compiled"))
    for prompt in (ids, ids.flip(0)):
        expected = tokens(plain, prompt, 16)
        assert torch.equal(tokens(recorded, prompt, 16), expected)
        assert torch.equal(tokens(compiled, prompt, 16)[:, :4], expected[:, :4]), "before another order of sums matters"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels on a GPU")
@pytest.mark.parametrize("scheme", ["w4a16g32", "w3a16g32sym", "w4a8sym"])
@torch.no_grad()
def test_packed_models_on_a_gpu(checkpoint: Callable[..., Path], scheme: str) -> None:
    directory = checkpoint(scheme, online=True)
    model, tokenizer = deploy.load(str(directory), torch.device("cuda"))
    reference, _ = deploy.load(str(directory), torch.device("cpu"))
    ids, far = torch.randint(3, 96, (2, 40)), 2e-2 if "a16" in scheme else 0.2
    assert_close("logits", reference(ids).logits, model(ids.cuda()).logits.cpu().float(), far)
    recorded, plain = (deploy.Generator(model, tokenizer, way) for way in ("recorded", "plain"))
    assert recorded.generate(PROMPTS, Limits(20)) == plain.generate(PROMPTS, Limits(20))
    assert len(deploy.Generator(model, tokenizer, "compiled").generate(PROMPTS, Limits(20))) == 3
