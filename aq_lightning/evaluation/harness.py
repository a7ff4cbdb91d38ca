"""Tasks of the package lm-eval, which is optional, asked of any model that tells likelihoods."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from aq_lightning.errors import RequestError
from aq_lightning.evaluation.sample import Score
from aq_lightning.evaluation.tasks import local_task

Pair = tuple[list[int], list[int]]
"""Tokens of a context, at least one, and of what follows it."""
Likelihoods = Callable[[Sequence[Pair]], list[tuple[float, bool]]]
"""For each pair, the logarithm of the probability of what follows, and whether each token of it is the likeliest."""

_SEED = 1234  # of the examples' choice, as lm-eval's command line has it
_UNLOADED = (LookupError, OSError, RuntimeError, TypeError, ValueError)  # a task or its data that is not there


def check_installed() -> None:
    """
    Raises:
        RequestError: lm-eval is not there.
    """
    try:
        import lm_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"Tasks are asked by the package lm-eval, which cannot be imported ({error}): "
            "run `pip install 'lm-eval>=0.4.13,<0.5'`."
        ) from error


def check_tasks(tasks: Sequence[str]) -> list[str | dict[str, Any]]:
    """Tasks as lm-eval takes them.

    Args:
        tasks: names that lm-eval knows (``piqa``, ``arc_easy``, ``mmlu``), or ``NAME=FILE`` for questions in a file.

    Raises:
        RequestError: lm-eval is not installed, or a file is no file of questions.
    """
    named = [each.partition("=") for each in tasks]
    found = [local_task(name, Path(file)) if file else name for name, _, file in named]
    check_installed()
    return found


def ask(
    tasks: Sequence[str | dict[str, Any]],
    likelihoods: Likelihoods,
    tokenizer: PreTrainedTokenizerBase,
    shots: int | None = None,
    limit: int | None = None,
) -> dict[str, Score]:
    """Accuracies of a model.

    Args:
        tasks: as :func:`check_tasks` gives them.
        likelihoods: of the model.
        tokenizer: its own.
        shots: examples before each question; None: as each task has it, mostly 0.
        limit: questions of each task, from the first; None: all.

    Returns:
        ``"<task> <metric>"`` → one value per question, 1 for a right answer; of a group, over all its questions.

    Raises:
        RequestError: a task does not exist, cannot be fetched, or asks for generated text.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [task if isinstance(task, str) else task["task"] for task in tasks]
    with redirect_stderr(io.StringIO()):  # bars of steps that take no time
        try:
            loaded = TaskManager(include_defaults=any(isinstance(task, str) for task in tasks)).load(list(tasks))
        except _UNLOADED as error:
            raise RequestError(
                f"Tasks are lm-eval's, with data from the hub or the cache, got {', '.join(names)} "
                f"({type(error).__name__}: {error}): check the names and the connection, or name a file of questions "
                "as NAME=FILE."
            ) from error
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")  # 0 is meant: such a task has no examples
            task.set_config(key="num_fewshot", value=(own or 0) if shots is None or own == 0 else shots)
            task.set_fewshot_seed(seed=_SEED)
        model = harness_model(likelihoods, tokenizer)
        results = evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    return dict(scores_of(names, results["samples"], results.get("group_subtasks", {})))


def scores_of(
    names: Iterable[str], samples: Mapping[str, Sequence[Mapping[str, Any]]], groups: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, Score]]:
    """Of each task or group that was named, and of the tasks of a tag, which is only a name for several."""
    parts = {name: _leaves(name, groups) for name in names if name in samples or name in groups}
    covered = {leaf for leaves in parts.values() for leaf in leaves}
    for name, leaves in {**parts, **{leaf: [leaf] for leaf in samples if leaf not in covered}}.items():
        rows = [row for leaf in leaves for row in samples[leaf]]
        for metric in rows[0]["metrics"]:
            values = [row[metric] for row in rows if metric in row]
            if all(isinstance(value, (bool, int, float)) for value in values):  # others aggregate in their own way
                yield f"{name} {metric}", Score(torch.tensor(values, dtype=torch.float64))


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Tasks of a group, or the task itself."""
    members = [each for each in groups.get(name, ()) if each != name]
    return [leaf for member in members for leaf in _leaves(member, groups)] if members else [name]


def harness_model(likelihoods: Likelihoods, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model as lm-eval sees it; the class is made here because its base may not be installed."""
    from lm_eval.api.model import TemplateLM

    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)

    class Model(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return next((token for token in reversed(ends) if token is not None), 0)

        @property
        def prefix_token_id(self) -> int:
            return next((token for token in ends if token is not None), 0)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer(string, add_special_tokens=add_special_tokens is not False, verbose=False)["input_ids"]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return likelihoods([(context, following) for _, context, following in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise RequestError("Tasks choose between answers, got one of whole texts: score texts by --perplexity.")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise RequestError("Tasks choose between answers, got one that asks for generated text: leave it out.")

    return Model()
