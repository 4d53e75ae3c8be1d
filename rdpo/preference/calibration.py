"""Rewards tried on known pairs before the long work: that each can be had, and how often it prefers the right side.

Without pairs from the user there are two plain ones, on which the models are loaded and give a number or not;
functions, which may need columns that only the teacher writes, are then left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from typing import TYPE_CHECKING

import pyarrow as pa

from rdpo.config import Job, Pairs, Prompts, Reward, Synthesis
from rdpo.errors import InputError
from rdpo.files.stage_folder import StageFolder
from rdpo.preference.agreement import agreement
from rdpo.preference.pairs import make_pairs
from rdpo.preference.rewards import score_answers
from rdpo.preference.rewards.registry import kind_of
from rdpo.records import SIDES, alive
from rdpo.synthesis.columns import Reading, pair_columns
from rdpo.synthesis.given import given_answers
from rdpo.synthesis.prompts import beside, read_prompts, without_duplicates

if TYPE_CHECKING:
    import ray.data

SOURCE = "calibration.source"
KNOWN = Pairs(chosen="chosen", rejected="rejected")
PLAIN = files("rdpo.preference") / "known_pairs.jsonl"


def known_pairs(job: Job) -> str:
    """Where the known pairs are."""
    return job.calibration.source or str(PLAIN)


def tried_rewards(job: Job) -> list[Reward]:
    """The rewards that are tried: all on pairs of the user's, else those that load a model of their own."""
    if job.calibration.source:
        return job.rewards
    kinds = [kind_of(reward) for reward in job.rewards]
    return [kind.in_trial() for kind in kinds if kind.needs_trial(job)]


def trial_prompts(job: Job) -> Prompts:
    """How the known pairs are read."""
    own = job.calibration.source is not None
    column = job.prompts.column if own else "prompt"
    settings = beside(job.prompts, known_pairs(job), column, job.calibration.limit)
    return settings if own else settings.model_copy(update={"system": None})


def calibrate(job: Job, folder: StageFolder | None = None) -> list[ray.data.Dataset]:
    """The known pairs with the scores of the tried rewards; and those lines of their source that are none.

    `folder` notes what ended the work on some from outside.
    """
    prompts = trial_prompts(job)
    reading = Reading(SOURCE, pair_columns(prompts.column, "prompts.column", SOURCE))
    trial = job.model_copy(
        update={
            "prompts": prompts,
            "synthesis": Synthesis(reasoning=job.synthesis.reasoning),
            "rewards": tried_rewards(job),
            "pairs": KNOWN,
        }
    )
    # Held, for it is read twice: for the pairs, and for the lines that are none.
    read = without_duplicates(read_prompts(trial, reading).materialize()).materialize()
    pairs = given_answers(read.filter(alive), trial).materialize()
    scored = score_answers(pairs.filter(alive), trial, list(SIDES), folder=folder)
    unusable = [rows.filter(lambda row: not alive(row)) for rows in (read, pairs)]
    # Rewards see answers alone, so that known pairs need no reasoning.
    answers_alone = trial.model_copy(update={"synthesis": Synthesis()})
    return [*unusable, make_pairs(scored, answers_alone)]


def right_sides(kept: Iterable[pa.Table], job: Job) -> dict[str, float]:
    """How often each reward prefers the side it should; ties count half."""
    found = agreement(kept, KNOWN)
    return {reward.name: found[reward.name].preferred for reward in tried_rewards(job)} if found else {}


def check_calibration(kept: int, reasons: dict[str, int], job: Job) -> None:
    """Look at what came of the trial.

    Raises:
        InputError: no pair got scores, or one of rdpo's own did not.
    """
    if reasons and (not kept or not job.calibration.source):
        own = job.calibration.source
        setting, where = (SOURCE, own) if own else ("rewards", "two plain pairs")
        raise InputError(f"{setting}: the trial on {where} failed: {next(iter(reasons))}")
