"""What each stage does, in the order in which data passes them: the wiring between the rooms and the run."""

from __future__ import annotations

from dataclasses import replace

from rdpo.config import Job
from rdpo.execution.stage import RowWork, Stage
from rdpo.execution.streaming import stage_source
from rdpo.records import HELDOUT
from rdpo.stages import pairs, policy, prompts, trial
from rdpo.stages import settings as lineage
from rdpo.stages.names import job_stages

STAGES = (
    Stage("prompts", (), lineage.prompts, prompts.take_prompts),
    Stage("calibration", (), lineage.calibration, trial.try_rewards, unit="known pairs"),
    Stage(
        "synthesis",
        ("prompts",),
        lineage.synthesis,
        rows=RowWork(prompts.training_prompts, prompts.write_answers, prompts.synthesis_summary, generates=True),
    ),
    Stage(
        "rewards",
        ("synthesis",),
        lineage.rewards,
        rows=RowWork(lambda run: stage_source(run, "synthesis"), pairs.score),
        joins=True,
    ),
    Stage("pairs", ("rewards",), lineage.pairs, rows=RowWork(pairs.scored, pairs.pair, pairs.pairs_summary)),
    Stage("replay", ("prompts", "pairs"), lineage.replay, pairs.draw_replay, unit="ready pairs"),
    Stage("reference", ("pairs", "replay"), lineage.reference, rows=RowWork(pairs.pairs_source, pairs.refer)),
    Stage("training", ("reference",), lineage.training, policy.train_policy, id_column=None, unit="steps"),
    Stage("policy", ("training",), lineage.policy, policy.complete_policy, id_column=None, unit="model"),
    Stage("retention", ("policy",), lineage.retention, policy.measure_retention, unit="texts"),
    Stage(
        "evaluation",
        ("prompts", "policy"),
        lineage.evaluation,
        rows=RowWork(
            lambda run: prompts.split_source(run, HELDOUT, run.job.evaluation.limit),
            policy.evaluate,
            policy.evaluation_summary,
            generates=True,
        ),
    ),
    Stage(
        "model",
        ("training", "policy", "evaluation"),
        lineage.publish,
        policy.publish_model,
        id_column=None,
        unit="model",
    ),
)


def stages_of(job: Job) -> tuple[Stage, ...]:
    """The stages of a job, in order: all but those that it leaves out."""
    return tuple(
        replace(stage, inputs=tuple(name for name in stage.inputs if name in job_stages(job)))
        for stage in STAGES
        if stage.name in job_stages(job)
    )
