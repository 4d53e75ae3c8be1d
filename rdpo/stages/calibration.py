"""Calibration: the rewards tried on known pairs, before any long work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdpo.errors import named
from rdpo.execution.stage import Stage
from rdpo.records import ID_COLUMN
from rdpo.stages.settings import tokenizer_settings

if TYPE_CHECKING:
    from rdpo.config import Job
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings, Summary
    from rdpo.files.stage_folder import StageFolder
    from rdpo.tracking.console import Meter


def settings(job: Job) -> Settings:
    """Settings of the trial of the rewards, with the known pairs and the models as they are now."""
    from rdpo.preference.calibration import SOURCE, known_pairs, trial_prompts, tried_rewards
    from rdpo.preference.rewards import reward_settings
    from rdpo.preference.rewards.registry import kind_of
    from rdpo.synthesis.sources import content_hash

    tried = tried_rewards(job)
    rewards = reward_settings(job.model_copy(update={"rewards": tried}))
    with named(SOURCE):
        content = content_hash(known_pairs(job))
    return {
        **trial_prompts(job).model_dump(exclude={"source", "near_duplicates"}),
        "content": content,
        **tokenizer_settings(job),
        "seed": job.seed if any(kind_of(reward).seeded for reward in tried) else None,
        "rewards": [{**one, "weight": 1.0} for one in rewards],
    }


def try_rewards(run: Run, folder: StageFolder, meter: Meter) -> Summary:
    """The rewards on known pairs; how often each prefers the side it should.

    Raises:
        InputError: one cannot be had, or gives no numbers.
        EndpointDown: a server answers nothing.
    """
    from rdpo.files.rows import write_rows
    from rdpo.files.unfinished import forget_end, raise_end
    from rdpo.preference.calibration import calibrate, check_calibration, right_sides, tried_rewards

    folder.clear_parts()
    forget_end(folder)
    for rows in calibrate(run.job, folder) if tried_rewards(run.job) else ():
        write_rows(rows, folder, ID_COLUMN, lambda block: meter.advance(block.rows + block.dropped))
    raise_end(folder)
    check_calibration(folder.count(), folder.reasons(), run.job)
    shares = right_sides(folder.tables(), run.job)
    for reward, share in shares.items() if run.job.calibration.source else ():
        run.console.say(f"{'':<12}{reward} prefers the better answer in {share:.2f} of the known pairs")
    return {"right": shares}


STAGE = Stage("calibration", inputs=(), settings=settings, execute=try_rewards, unit="known pairs", command="calibrate")
