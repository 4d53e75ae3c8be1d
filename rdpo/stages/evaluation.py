"""Evaluation: start model and trained model answer the held-out prompts, and are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rdpo.execution.stage import Reads, RowWork, Source, Stage
from rdpo.records import HELDOUT, ID_COLUMN, Messages, Row, rows_of, table_of
from rdpo.stages.prompts import split_source
from rdpo.stages.settings import prefill_settings, question_settings, rendering_of_student, student_settings

if TYPE_CHECKING:
    import ray.data

    from rdpo.cluster.pools import Pool
    from rdpo.config import Job
    from rdpo.execution.reader import RunReader
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings, Summary
    from rdpo.files.stage_folder import StageFolder


def settings(job: Job) -> Settings:
    """Settings of the evaluation stage."""
    from rdpo.config.evaluation import KL_ANSWERS
    from rdpo.preference.rewards import reward_settings

    asked = question_settings(job, job.evaluation.condition or ("refine" if job.evaluation.refine else None))
    final = {"final": job.pairs.chosen} if job.evaluation.refine else {}
    start = {"start": start_settings(job)}
    # Evaluations that were made before KL had answers of its own are not made again for it.
    left_out = {"samples", "kl_answers"} if job.evaluation.kl_answers == KL_ANSWERS else {"samples"}
    return {
        **final,
        **job.evaluation.model_dump(exclude=left_out),
        "engine": start["start"]["engine"],
        **asked,
        **(prefill_settings(job) if job.evaluation.refine else {}),
        **start,
        "rewards": reward_settings(job),
        "seed": job.seed,
    }


def start_settings(job: Job) -> Settings:
    """What the start model's answers to the held-out prompts depend on, beside the prompts."""
    from rdpo.modeling.weights import ModelRef
    from rdpo.synthesis.engine import engine_settings

    # Named only where there is one: what was answered without a condition is answered still.
    condition = {"condition": job.evaluation.condition} if job.evaluation.condition else {}
    return {
        **job.evaluation.model_dump(include={"sampling"}),
        "engine": engine_settings(job.evaluation.engine, ModelRef.student(job)),
        **condition,
        **question_settings(job, job.evaluation.condition),
        "student": student_settings(job),
        **rendering_of_student(job),
        "seed": job.seed,
    }


def heldout_prompts(run: RunReader) -> Source:
    """The prompts that both models answer."""
    return split_source(run, HELDOUT, run.job.evaluation.limit)


def evaluate(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    """Answers of both models, their scores and the divergence."""
    import ray.data

    from rdpo.evaluation.compare import DRAWN
    from rdpo.evaluation.generate import START, TRAINED, add_divergence, answer_prompts, questions
    from rdpo.modeling.weights import ModelRef
    from rdpo.preference.rewards import score_answers
    from rdpo.training.checkpoint import MERGED

    job = run.job
    trained = run.folder("policy").address(MERGED)
    models = {START: ModelRef.student(job), TRAINED: ModelRef(trained)}

    prompts = rows.take_all()
    asked = {row[ID_COLUMN]: row["prompt"] for row in questions(prompts, job)}
    known = {START: _start_answers(run, asked)}
    answered = answer_prompts(prompts, job, models, known)
    rows = ray.data.from_arrow(table_of(answered))
    scored = score_answers(rows, job, [START, TRAINED], folder=run.folder("evaluation")).materialize()
    return add_divergence(scored, job, trained, DRAWN)


def _start_answers(run: Run, asked: Mapping[str, Messages] | None = None) -> dict[str, Row]:
    """The start model's answers by prompt, as far as a sibling has them; with `asked`, those to these questions."""
    from rdpo.evaluation.generate import START, answer_columns
    from rdpo.execution.keys import same_settings

    own, columns = start_settings(run.job), [ID_COLUMN, *answer_columns(START)]
    asked = asked or {}
    known: dict[str, Row] = {}
    for folder, theirs in run.made_by_siblings("evaluation"):
        # What else their evaluation depends on is no matter of the start model.
        if not same_settings(theirs.get("start"), own) or not folder.parts():
            continue
        for row in rows_of(folder.tables("", columns, ["prompt"])):
            name, question = row.pop(ID_COLUMN), row.pop("prompt", None)
            # One prompt is another question where a turn asks it together with other columns of the row.
            if asked.get(name, question) == question:
                known[name] = row
    return known


def summary(run: Run, folder: StageFolder) -> Summary:
    """Start model and trained model compared by every reward."""
    from rdpo.evaluation.compare import summarize

    weights = {reward.name: reward.weight for reward in run.job.rewards}
    evaluated = folder.table().sort_by(ID_COLUMN).to_pylist() if folder.parts() else []
    return summarize(evaluated, weights)


def has_failed(reasons: Mapping[str, int]) -> bool:
    """Whether it was the rewards that left no row; answers that cannot be compared are a result."""
    return max(reasons, key=lambda reason: reasons[reason], default="").startswith("reward ")


def pools(job: Job) -> list[Pool]:
    """Who reads the answers last; those that write and score them have ended by then."""
    from rdpo.evaluation.generate import divergence_pool

    return [divergence_pool(job)]


STAGE = Stage(
    "evaluation",
    inputs=("prompts", "policy"),
    settings=settings,
    rows=RowWork(heldout_prompts, evaluate, summary, generates=True, has_failed=has_failed, pools=pools),
    reads={"policy": Reads(below="merged/")},
    packages=("rdpo", "vllm", "torch", "transformers"),
    command="evaluate",
)
