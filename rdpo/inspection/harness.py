"""Tasks of lm-evaluation-harness for the start model and the trained one: did we break the rest?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from rdpo.errors import InputError, did_you_mean
from rdpo.evaluation.intervals import Estimate, mean_interval, with_interval
from rdpo.execution.reader import RunReader
from rdpo.inspection.chat import load_speakers
from rdpo.tracking.tables import aligned

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """One metric of one task, under both models."""

    task: str
    metric: str
    documents: int
    start: float
    trained: float
    difference: Estimate | None
    """With its 95% interval, paired over the documents; None where the metric is not a mean of documents' scores."""


def changes(
    run_dir: str, tasks: list[str], include: str | None = None, limit: int | None = None, chat: bool = False
) -> list[Change]:
    """Both models' metrics in tasks of the harness, answered by transformers in this process.

    Args:
        run_dir: a finished run.
        tasks: names of tasks, groups or tags; also patterns, as `mmlu_*`.
        include: folder with tasks of one's own.
        limit: documents of each task; by default all.
        chat: put each question in the model's chat template.

    Raises:
        InputError: the harness is not installed, there is no such task, or the run has no published model.
    """
    if find_spec("lm_eval") is None:
        raise InputError('lm-evaluation-harness is not installed; pip install "rdpo[harness]"')
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    run, (manager, found) = RunReader(run_dir), _tasks(tasks, include)
    start, trained = (
        simple_evaluate(
            HFLM(
                pretrained=speaker.model,
                tokenizer=speaker.chat.tokenizer,
                think_end_token=speaker.chat.reasoning.closing if speaker.chat.reasoning else None,
                chat_template_args=dict(speaker.chat.template.arguments),
            ),
            tasks=found,
            limit=limit,
            apply_chat_template=chat,
            task_manager=manager,
            # Intervals are made below, paired over the documents of both models.
            bootstrap_iters=0,
        )
        for speaker in load_speakers(run)
    )
    return list(_compared(start, trained))


def _tasks(names: list[str], include: str | None) -> tuple[TaskManager, list[str]]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    for name in names:
        if not manager.match_tasks([name]):
            raise InputError(f"the harness has no task {name}{did_you_mean(name, manager.all_tasks)}")
    return manager, manager.match_tasks(names)


def _compared(start: Results, trained: Results) -> Iterator[Change]:
    for task, samples in start["samples"].items():
        for metric, kept in _metrics(samples):
            before, after = (side["results"][task].get(f"{metric},{kept}") for side in (start, trained))
            if before is None:
                continue

            scores, later = (_scores(side["samples"][task], metric, kept) for side in (start, trained))
            name = metric if kept == "none" else f"{metric} {kept}"
            yield Change(task, name, len(scores), before, after, _difference(scores, later))


def _metrics(samples: list[Results]) -> list[tuple[str, str]]:
    """The metrics of a task, each with the filter that answers went through before it; sorted."""
    found: set[tuple[str, str]] = set()
    for sample in samples:
        found.update((metric, sample["filter"]) for metric in sample["metrics"])
    return sorted(found)


def _scores(samples: list[Results], metric: str, filter_name: str) -> dict[int, Any]:
    """What each document scored, by its place in the task."""
    return {sample["doc_id"]: sample[metric] for sample in samples if sample["filter"] == filter_name}


def _difference(start: dict[int, Any], trained: dict[int, Any]) -> Estimate | None:
    try:
        gains = np.array([float(trained[document]) - float(score) for document, score in start.items()])
    except (TypeError, ValueError):
        # The score of a document may be what a whole task's metric is made of: a pair of texts, a list.
        return None
    return mean_interval(gains)


def table(found: list[Change]) -> list[str]:
    """The changes as lines of text."""
    cells = [["task", "metric", "n", "start", "trained", "difference (95% interval)"]]
    for change in found:
        difference = with_interval(change.difference, "+.3f") if change.difference else ""
        numbers = [f"{change.documents:,}", f"{change.start:.3f}", f"{change.trained:.3f}"]
        cells.append([change.task, change.metric, *numbers, difference])
    return aligned(cells, right=[2, 3, 4])
