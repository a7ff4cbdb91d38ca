"""Files of questions become tasks of lm-eval, and are refused by name where they are none."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path

import pytest
from helpers import SHARED_DATA, word_tokenizer

from aq_lightning.errors import RequestError
from aq_lightning.evaluation import ask, check_tasks
from aq_lightning.evaluation.harness import Pair, scores_of
from aq_lightning.evaluation.tasks import local_task

ROWS = {
    "piqa": {"goal": "word1", "sol1": "word2", "sol2": "word3 word4", "label": 1},
    "hellaswag": {"query": "word1 word5", "choices": ["word2", "word3", "word4"], "label": 2},
    "arc": {"question": "word1", "choices": ["word2", "word3"], "label": 0, "more": "is left alone"},
    "winogrande": {"options": ["word1 word2", "word1 word3"], "continuation": "word4", "label": 1},
    "boolq": {"passage": "word1", "question": "word2", "label": 0},
}
try:
    check_tasks([])
    installed = True
except RequestError:
    installed = False
needs_lm_eval = pytest.mark.skipif(not installed, reason="lm-eval, an optional extra, is not installed")


def written(tmp_path: Path, *rows: dict, name: str = "questions.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("kind", ROWS)
def test_the_fields_tell_the_kind(tmp_path: Path, kind: str) -> None:
    task = local_task("mine", written(tmp_path, ROWS[kind], ROWS[kind]))
    assert task["task"] == "mine" and task["dataset_kwargs"]["data_files"]["test"].endswith("questions.jsonl")
    metrics = [each["metric"] for each in task["metric_list"]]
    assert metrics == (["acc"] if kind in ("winogrande", "boolq") else ["acc", "acc_norm"]), "as lm-eval has it"


@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "got none common"),
        ([{"text": "word1"}], "got text common"),
        ([ROWS["arc"], ROWS["piqa"]], "got label common"),
        ([ROWS["arc"], {**ROWS["arc"], "label": 2}], "got 2 for 2 in row 1"),
        ([{**ROWS["piqa"], "label": "1"}], "got '1' for 2 in row 0"),
        ([{**ROWS["winogrande"], "label": -1}], "got -1"),
    ],
)
def test_what_is_no_file_of_questions(tmp_path: Path, rows: list[dict], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        local_task("mine", written(tmp_path, *rows))


def test_a_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="existing file, got .*nowhere"):
        local_task("mine", tmp_path / "nowhere.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"question": ')
    with pytest.raises(RequestError, match="lines of JSON"):
        local_task("mine", tmp_path / "broken.jsonl")


def test_without_lm_eval_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: object):
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(RequestError, match="run `pip install 'lm-eval"):
        check_tasks(["piqa"])


def prefers(liked: str):
    """Likelihoods of a model that takes an answer for the likelier the more of its tokens are ``liked``."""
    token = word_tokenizer()(liked)["input_ids"][0]

    def likelihoods(pairs: list[Pair]) -> list[tuple[float, bool]]:
        assert all(context and following for context, following in pairs)
        return [(sum(each == token for each in [*context, *following]) - 5.0, False) for context, following in pairs]

    return likelihoods


@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    "kind, liked, right",
    [("piqa", "word3", 1), ("piqa", "word2", 0), ("hellaswag", "word4", 1), ("hellaswag", "word2", 0)]
    + [("arc", "word2", 1), ("arc", "word3", 0), ("winogrande", "word3", 1), ("winogrande", "word2", 0)],
)
def test_right_answers_are_counted(tmp_path: Path, kind: str, liked: str, right: int) -> None:
    """Of three questions, the last with the other answer as the right one."""
    other = {**ROWS[kind], "label": 0 if ROWS[kind]["label"] else 1}
    file = written(tmp_path, ROWS[kind], ROWS[kind], other)
    scores = ask(check_tasks([f"mine={file}"]), prefers(liked), word_tokenizer())
    assert scores["mine acc"].values.tolist() == [right, right, 1 - right]
    assert ("mine acc_norm" in scores) == (kind != "winogrande") and not math.isnan(scores["mine acc"].error)
    first = ask(check_tasks([f"mine={file}"]), prefers(liked), word_tokenizer(), limit=1)
    assert first["mine acc"].values.tolist() == [right]


def test_a_group_is_the_mean_over_all_its_questions_and_a_tag_is_its_tasks() -> None:
    """The shape of what lm-eval 0.4.13 answers: groups within groups (MMLU), and tags, which it replaces by tasks."""
    samples = {
        name: [{"metrics": ["acc", "f1"], "acc": value, "f1": (1, 0)} for value in values]
        for name, values in {"one": [1.0], "two": [0.0, 0.0], "three": [1.0], "four": [0.0]}.items()
    }
    groups = {"outer": ["inner", "three"], "inner": ["one", "two"]}
    found = {name: score.values.tolist() for name, score in scores_of(["outer", "tag"], samples, groups)}
    assert found == {"outer acc": [1, 0, 0, 1], "four acc": [0]}
    assert dict(scores_of(["three"], {"three": samples["three"]}, {}))["three acc"].value == 1


@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_a_task_of_lm_evals_in_a_file_of_its_own(tmp_path: Path) -> None:
    questions = written(tmp_path, ROWS["piqa"])
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {questions}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{goal}}'\ndoc_to_choice: '{{[sol1, sol2]}}'\n"
        "doc_to_target: label\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    scores = ask(check_tasks([str(tmp_path / "own.yaml")]), prefers("word3"), word_tokenizer())
    assert {name: score.value for name, score in scores.items()} == {"own acc": 1}


@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(RequestError, match="got no-such-task .*NAME=FILE"):
        ask(check_tasks(["no-such-task"]), prefers("word1"), word_tokenizer())


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no {SHARED_DATA}")
@pytest.mark.parametrize("name", ["piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande"])
def test_published_sets_are_of_known_kinds(name: str) -> None:
    assert local_task(name, SHARED_DATA / "zeroshot" / f"{name}.jsonl")["output_type"] == "multiple_choice"
