"""Did we break the rest? How much likelihood conversations that the training is not about have lost.

For each conversation `kl` is log pi(y|x) - log ref(y|x) of its given answer, in nats over `kl_length` tokens; the
perplexity of the trained model is that of the start model times exp(-kl / kl_length).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rdpo.config import Job, Prompts, Retention, Synthesis
from rdpo.evaluation.generate import add_divergence
from rdpo.evaluation.intervals import Estimate, groups_of, mean_interval, with_interval
from rdpo.records import ID_COLUMN, Row, alive, by_id, digest, drop, extra_of, table_of
from rdpo.synthesis.columns import Needed, Reading
from rdpo.synthesis.prompts import beside, read_prompts
from rdpo.tracking.tables import aligned

if TYPE_CHECKING:
    import ray.data

SOURCE = "retention.source"
ANSWER = "answer"
DUPLICATE = "duplicate of an earlier text"


def text_source(job: Job, retention: Retention) -> tuple[Prompts, Reading]:
    """Where the conversations are, and how they are read."""
    settings = beside(job.prompts, retention.source, retention.column, retention.limit)
    needed = Needed((retention.column,), "retention.column"), Needed((retention.answer,), "retention.answer")
    return settings, Reading(SOURCE, needed)


def texts(job: Job, retention: Retention) -> list[Row]:
    """The conversations, each with its given answer; one that cannot be used has the reason."""
    prompts, reading = text_source(job, retention)
    # With a task the source is one of prompts, not of pairs.
    trial = job.model_copy(update={"prompts": prompts, "synthesis": Synthesis(task="best_of")})

    found: dict[str, Row] = {}
    for row in read_prompts(trial, reading).take_all():
        answered = answer_of(row, retention.answer) if alive(row) else row
        is_duplicate = answered[ID_COLUMN] in found
        # A duplicate lies in the dropped table beside the first one, and needs an id of its own there.
        name = f"{row['source']}:{row['line']}" if is_duplicate else answered[ID_COLUMN]
        found[name] = drop({**answered, ID_COLUMN: name}, DUPLICATE) if is_duplicate else answered
    return list(found.values())


def answer_of(row: Row, column: str) -> Row:
    """The row with its given answer, and an id of its own."""
    answer = extra_of(row).get(column)
    if not isinstance(answer, str) or not answer.strip():
        return drop(row, f"{column}: no text")
    name = digest(row[ID_COLUMN], answer)
    return {**row, ID_COLUMN: name, ANSWER: answer.strip(), f"{ANSWER}_finish_reason": "stop"}


def measured(rows: list[Row], job: Job, trained: str) -> ray.data.Dataset:
    """The conversations with their log-ratios; those that cannot be used as they are."""
    import ray.data

    usable, others = [row for row in rows if alive(row)], [row for row in rows if not alive(row)]
    data = add_divergence(ray.data.from_arrow(table_of(usable)), job, trained, ANSWER)
    return data.union(ray.data.from_arrow(table_of(others))) if others else data


def summary(rows: list[Row]) -> dict[str, Any]:
    """Number of conversations, and the geometric mean of their perplexities' factors, with its interval over them."""
    return {"texts": len(rows), "perplexity_factor": vars(_factor([rows], rows))}


def _factor(runs: Sequence[Sequence[Row]], texts: Sequence[Row]) -> Estimate:
    """The geometric mean of the texts' factors over runs that measured the same ones, in the same order."""
    # In logarithms, whose mean is that of the factors' geometric one.
    nats = np.array([list(map(_lost, rows)) for rows in runs])
    lost = mean_interval(nats, groups_of(texts))
    return Estimate(*(math.exp(nats) for nats in (lost.mean, lost.low, lost.high)))


def _lost(row: Row) -> float:
    """Nats of likelihood a token that the trained model has lost."""
    return float(-row["kl"] / row["kl_length"])


def table(measured: dict[tuple[str, int], list[Row]]) -> list[str]:
    """What the arms of a comparison have lost, as lines of text: geometric means over texts and seeds.

    Args:
        measured: the conversations of each arm and seed, with their log-ratios.
    """
    if not measured:
        return []

    by_text = {run: by_id(rows) for run, rows in measured.items()}
    shared = sorted(set.intersection(*map(set, by_text.values())))
    arms = dict.fromkeys(arm for arm, _ in measured)
    cells = [["", "perplexity, times the start model's (95%)"]]
    for arm in arms if shared else ():
        own = [rows for (name, _), rows in by_text.items() if name == arm]
        runs = [_in_order(rows, shared) for rows in own]
        cells.append([arm, with_interval(_factor(runs, runs[0]), ".3f")])
    return ["", f"other texts, {len(shared)}", *aligned(cells)]


def _in_order(rows: dict[str, Row], texts: Sequence[str]) -> list[Row]:
    return [rows[text] for text in texts]
