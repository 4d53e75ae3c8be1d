"""Model: the Hugging Face folder that leaves the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rdpo.execution.stage import Reads, Stage
from rdpo.stages.policy import exported

if TYPE_CHECKING:
    from rdpo.config import Job
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings, Summary
    from rdpo.files.stage_folder import StageFolder
    from rdpo.tracking.console import Meter


def settings(job: Job) -> Settings:
    """Settings of the published model."""
    return job.publish.model_dump()


def publish_model(run: Run, folder: StageFolder, meter: Meter) -> Summary:
    """The Hugging Face folder, reloaded and compared; what was checked."""
    from rdpo.cluster.installed import versions
    from rdpo.evaluation.publish import publish
    from rdpo.training.checkpoint import MERGED

    inputs = {stage.name: run.require(stage.name, "model") for stage in run.stages if stage is not run.stages[-1]}
    facts = {
        "version": versions()["rdpo"],
        "evaluation": inputs["evaluation"].summary,
        "pairs": inputs["reference"].rows_out,
        "lineage": {name: manifest.digest for name, manifest in inputs.items()},
    }
    policy = run.folder("policy")
    # The start model itself has no adapter or weights of its own.
    weights = exported(run, "policy") or exported(run, "training")
    with folder.made() as target:
        checks = publish(run.job, weights, Path(policy.local(MERGED)), target, facts)
    meter.advance(1, note=f"reloaded; logits differ by {checks['logit_difference']:.1e}")
    return checks


STAGE = Stage(
    "model",
    inputs=("training", "policy", "evaluation"),
    settings=settings,
    execute=publish_model,
    # The model card says how all of them were made.
    reads=dict.fromkeys(("training", "policy", "evaluation"), Reads(summary=True, making=True)),
    id_column=None,
    unit="model",
    command="publish",
)
