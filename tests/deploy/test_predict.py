"""``train.py predict`` says what the model answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aq_lightning.cli import main
from aq_lightning.export.loading import open_model

PROMPTS = ["word3 word14 word15", "word6", "word5 word35 word8 word9"]


def predict(directory: Path, *more: str) -> None:
    main(["predict", f"--model.pretrained={directory}", "--trainer.accelerator=cpu", "--max_new_tokens=6", *more])


def answer(directory: Path, prompt: str) -> str:
    """Of transformers, with the dequantized model."""
    model, tokenizer, _ = open_model(str(directory), torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("online", [False, True])
def test_a_prompt(checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture, online: bool) -> None:
    directory = checkpoint("w4a16g32", online=online)
    predict(directory, f"--prompt={PROMPTS[0]}")
    assert capsys.readouterr().out == answer(directory, PROMPTS[0]) + "\n"


def test_an_ordinary_model(model_directory: Path, capsys: pytest.CaptureFixture) -> None:
    predict(model_directory, f"--prompt={PROMPTS[1]}")
    assert capsys.readouterr().out == answer(model_directory, PROMPTS[1]) + "\n"


def test_a_file_of_prompts(checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    directory = checkpoint("w4a16g32")
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS))
    predict(directory, f"--prompts={file}", "--batch=2")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"prompt": prompt, "answer": answer(directory, prompt)} for prompt in PROMPTS]


def test_draws_follow_the_command_lines_seed(checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    directory, said = checkpoint("w4a16g32"), []
    for seed in (1, 1, 2):
        predict(directory, f"--prompt={PROMPTS[0]}", "--temperature=1.5", f"--seed_everything={seed}")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "add --prompt"),
        (["--prompt=word1", "--prompts=file"], "one of two"),
        (["--prompts=missing.txt"], "readable file"),
        (["--prompt=word1", "--temperature=-1"], "temperature"),
        (["--prompt=word1", "--max_new_tokens=0"], "max_new_tokens 0"),
        (["--prompt=word1", "--batch=0"], "--batch 0"),
        (["--prompt=word1", "--chat=true"], "chat template"),
    ],
)
def test_refusals(
    checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        predict(checkpoint("w4a16g32"), *options)
    said = capsys.readouterr()
    assert stop.value.code == 2 and message in said.err and not said.out
