"""The stages in the order in which data passes them. What names stages, or runs over them, asks this table.

Importing it loads no heavy library: each stage imports what it needs when it is called.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rdpo.errors import InputError, did_you_mean
from rdpo.execution.stage import Stage
from rdpo.stages import (
    calibration,
    evaluation,
    made,
    model,
    pairs,
    policy,
    prompts,
    reference,
    replay,
    retention,
    rewards,
    screening,
    selection,
    suites,
    synthesis,
    training,
)

if TYPE_CHECKING:
    from rdpo.config import Job

STAGES = (
    made.STAGE,
    prompts.STAGE,
    calibration.STAGE,
    synthesis.STAGE,
    screening.STAGE,
    selection.STAGE,
    rewards.STAGE,
    pairs.STAGE,
    replay.STAGE,
    reference.STAGE,
    training.STAGE,
    policy.STAGE,
    retention.STAGE,
    evaluation.STAGE,
    suites.STAGE,
    model.STAGE,
)
SHARED_BY_TYPES = STAGES[: STAGES.index(reference.STAGE) + 1]
"""Those that the types of annotators have in common."""
NAMES = tuple(stage.name for stage in STAGES)
COMMANDS = {stage.command: stage.name for stage in STAGES if stage.command}
"""What is typed to bring one stage of a run up to date."""
WITHOUT_ROWS = tuple(stage.name for stage in STAGES if stage.id_column is None)
"""Stages whose folder holds files of another kind than rows."""


def stages_of(job: Job) -> tuple[Stage, ...]:
    """The stages of a job, in order: all but those that it leaves out, also among the inputs of others.

    Where types of annotators are fitted, each type's policy has its further stages in a run of its own.
    """
    wanted = [stage for stage in (SHARED_BY_TYPES if job.fits_types else STAGES) if stage.wanted(job)]
    names = {stage.name for stage in wanted}

    stages = []
    for stage in wanted:
        inputs = tuple(name for name in stage.inputs if name in names)
        stages.append(replace(stage, inputs=inputs))
    return tuple(stages)


def names_of(job: Job) -> tuple[str, ...]:
    """Names of a job's stages, in order."""
    return tuple(stage.name for stage in stages_of(job))


def known_stage(name: str) -> str:
    """The name of a stage, as a person gives it.

    Raises:
        InputError: there is no such stage.
    """
    if name not in NAMES:
        raise InputError(f"no stage {name}{did_you_mean(name, NAMES)}; the stages are {', '.join(NAMES)}")
    return name
