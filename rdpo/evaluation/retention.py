"""Did we break the rest? How much likelihood conversations that the training is not about have lost.

For each conversation `kl` is log pi(y|x) - log ref(y|x) of its given answer, in nats over `kl_length` tokens; the
perplexity of the trained model is that of the start model times exp(-kl / kl_length).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rdpo.config import Job, Retention, Synthesis
from rdpo.evaluation.compare import Estimate, bootstrap
from rdpo.evaluation.generate import add_divergence
from rdpo.records import ID_COLUMN, Row, alive, digest, drop, extra_of, table_of
from rdpo.synthesis.prompts import beside, read_prompts

if TYPE_CHECKING:
    import ray.data

ANSWER = "answer"
DUPLICATE = "duplicate of an earlier text"


def texts(job: Job, retention: Retention) -> list[Row]:
    """The conversations, each with its given answer; one that cannot be used has the reason."""
    prompts = beside(job.prompts, retention.source, retention.column, retention.limit)
    # With a task the source is one of prompts, not of pairs.
    trial = job.model_copy(update={"prompts": prompts, "synthesis": Synthesis(task="best_of")})
    found: dict[str, Row] = {}
    for row in read_prompts(trial).take_all():
        answered = answer_of(row, retention.answer) if alive(row) else row
        is_duplicate = answered[ID_COLUMN] in found
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


def summary(rows: list[Row], seed: int) -> dict[str, Any]:
    """Number of conversations, and the geometric mean of their perplexities' factors, with its interval over them."""
    import numpy as np

    lost = bootstrap(np.array([-row["kl"] / row["kl_length"] for row in rows]), seed)
    factor = Estimate(*(math.exp(nats) for nats in (lost.mean, lost.low, lost.high)))
    return {"texts": len(rows), "perplexity_factor": vars(factor)}


def table(summaries: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """What the arms of a comparison have lost, as lines of text; figures are means over the seeds."""
    measured = {run: one["perplexity_factor"] for run, one in summaries.items()}
    if not measured:
        return []
    arms = dict.fromkeys(arm for arm, _ in measured)
    width = max(map(len, arms)) + 2
    lines = ["", "other texts", f"{'':<{width}}perplexity, times the start model's (95%)"]
    for arm in arms:
        factors = [factor for run, factor in measured.items() if run[0] == arm]
        mean, low, high = (sum(factor[end] for factor in factors) / len(factors) for end in ("mean", "low", "high"))
        lines.append(f"{arm:<{width}}{mean:.3f} ({low:.3f} to {high:.3f})")
    return lines
