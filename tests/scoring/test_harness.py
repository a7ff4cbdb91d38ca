"""What lm-eval is told is what its own model of transformers tells it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import tiny_llama, word_tokenizer

from aq_lightning.evaluation import harness
from aq_lightning.scoring.answers import Whole
from aq_lightning.scoring.likelihoods import likelihoods

pytest.importorskip("lm_eval", reason="lm-eval, an optional extra, is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
PAIRS = [("word1 word2", " word3"), ("word1 word2", " word3 word4 word5"), ("word7 ", "word8"), ("word9", " word9")]
LONG = (" ".join(f"word{number % 90}" for number in range(150)), " word3 word4")  # the model reads 128


def test_likelihoods_are_those_of_lm_evals_own_model() -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<unk>", "eos_token": "<unk>"})
    theirs = HFLM(pretrained=tiny_llama(), tokenizer=tokenizer, device="cpu", batch_size=2, max_length=128)
    answers = Whole(tiny_llama(), torch.device("cpu"))
    ours = harness.harness_model(partial(likelihoods, answers, longest=answers.longest), tokenizer)
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in [*PAIRS, LONG, ("", "word4")]
    ]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for ((_, following), (value, greedy)), (wanted, likeliest) in zip(
        zip([*PAIRS, LONG, ("", "word4")], ours.loglikelihood(requests, disable_tqdm=True), strict=True),
        expected,
        strict=True,
    ):
        assert value == pytest.approx(wanted, abs=1e-4) and greedy == likeliest, following
    assert len({round(value, 3) for value, _ in expected}) == len(expected)
