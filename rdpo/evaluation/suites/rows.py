"""From the rows of a suite's source to prompts, answers of both models, and the number read off each.

A row has its `suite`, its `variant` and its `item`, the row of the source that it is made of; answers stand in `start`
and `trained`, what is read off them in `start_value` and `trained_value`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rdpo.config import Evaluation, Job, Prompts, Sampling, Suite, Synthesis
from rdpo.errors import InputError
from rdpo.evaluation.compare import MODELS
from rdpo.evaluation.generate import answer_prompts
from rdpo.evaluation.suites.kinds import KINDS, SuiteKind, asked
from rdpo.modeling.weights import ModelRef
from rdpo.records import ID_COLUMN, Row, alive, digest, drop
from rdpo.synthesis.columns import Needed, Reading
from rdpo.synthesis.near_duplicates import near_duplicates
from rdpo.synthesis.prompts import beside, read_prompts
from rdpo.synthesis.sources import check_source

SAMPLING = Sampling(temperature=0.0, max_tokens=256)
"""Both models answer greedily: what is measured is the model, not the draw."""
TRAINED_ON = "it nearly repeats a prompt that was trained on"
DUPLICATE = "duplicate of an earlier row"


def suite_source(job: Job, suite: Suite) -> tuple[Prompts, Reading]:
    """Where a suite's rows are, and how they are read."""
    kind, setting = KINDS[suite.kind], f"suites.{suite.named}"
    column = suite.column or kind.column
    source = suite.source or str(Path(__file__).with_name(f"{suite.kind}.jsonl"))
    needed = [Needed((column,), f"{setting}.column")]
    needed += [Needed((name,), setting) for name in (*kind.columns, *_label(suite))]
    return beside(job.prompts, source, column, suite.limit), Reading(setting, tuple(needed))


def check_suite(job: Job, suite: Suite) -> None:
    """Look whether a suite's source is there with its columns, and whether its answers can be measured.

    Raises:
        InputError: it is not, or they cannot.
    """
    check_source(*suite_source(job, suite))
    try:
        KINDS[suite.kind].check()
    except ImportError as error:
        raise InputError(f"suites.{suite.named}: {error}") from None


def _label(suite: Suite) -> tuple[str, ...]:
    return (suite.label,) if suite.kind == "refusals" else ()


def suite_rows(job: Job, suite: Suite, trained_on: Iterable[str]) -> list[Row]:
    """The prompts of a suite; those that cannot be used, and those that the run was trained on, with the reason.

    Args:
        job: the job.
        suite: the suite.
        trained_on: the words of the prompts that were trained on.
    """
    prompts, reading = suite_source(job, suite)
    # With a task the source is one of prompts, not of pairs.
    trial = job.model_copy(update={"prompts": prompts, "synthesis": Synthesis(task="best_of")})
    read = sorted(read_prompts(trial, reading).take_all(), key=lambda row: (row["source"], row["line"]))

    known = near_duplicates(trained_on, [(_place(row), asked(row)) for row in read if alive(row)])
    found: dict[str, Row] = {}
    for row in read:
        row = drop(row, TRAINED_ON) if _place(row) in known else row
        for one in variants_of(row, KINDS[suite.kind], suite):
            # A dropped row needs an id of its own beside the one that it repeats.
            is_duplicate = one[ID_COLUMN] in found
            name = digest(one[ID_COLUMN], _place(row)) if is_duplicate else one[ID_COLUMN]
            found[name] = drop({**one, ID_COLUMN: name}, DUPLICATE) if is_duplicate else one
    return list(found.values())


def _place(row: Row) -> str:
    return f"{row['source']}:{row['line']}"


def variants_of(row: Row, kind: SuiteKind, suite: Suite) -> Iterator[Row]:
    """The rows that are made of one of the source: a prompt for each variant, or the row with why there can be none."""
    base = {**row, "suite": suite.named, "item": row[ID_COLUMN], "variant": ""}
    if not alive(row):
        yield {**base, ID_COLUMN: digest(suite.named, row[ID_COLUMN])}
        return

    try:
        texts: Mapping[str, str] = kind.variants(row, suite)
    except ValueError as error:
        yield drop({**base, ID_COLUMN: digest(suite.named, row[ID_COLUMN], _place(row))}, str(error))
        return
    for variant, text in texts.items():
        prompt = [*row["prompt"][:-1], {**row["prompt"][-1], "content": text}]
        yield {**base, ID_COLUMN: digest(suite.named, text), "variant": variant, "prompt": prompt}


def answered(rows: list[Row], job: Job, trained: str) -> list[Row]:
    """The rows with both models' answers; `trained`: address of the trained model's folder."""
    own = Evaluation(sampling=SAMPLING, engine=job.evaluation.engine, kl_answers=0)
    start, after = MODELS
    models = {start: ModelRef.student(job), after: ModelRef(trained)}
    return answer_prompts(rows, job.model_copy(update={"evaluation": own}), models)


def measured(row: Row, kind: SuiteKind) -> Row:
    """The row with what is read off each model's answer; dropped where nothing can be."""
    values: dict[str, float | None] = {f"{model}_value": None for model in MODELS}
    if not alive(row):
        return {**row, **values}
    try:
        for model in MODELS:
            values[f"{model}_value"] = kind.value(row, row[model])
    except ValueError as error:
        row = drop(row, str(error))
    return {**row, **values}
