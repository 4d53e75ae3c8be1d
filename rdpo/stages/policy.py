"""Policy: the whole model, made of what training has left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rdpo.execution.stage import Reads, Stage
from rdpo.stages.settings import student_settings

if TYPE_CHECKING:
    from rdpo.config import Job
    from rdpo.execution.reader import RunReader
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings, Summary
    from rdpo.files.stage_folder import StageFolder
    from rdpo.tracking.console import Meter


def settings(job: Job) -> Settings:
    """Settings of the whole model that is made of what training left."""
    return {"extrapolation": job.training.extrapolation, "student": student_settings(job)}


def complete_policy(run: Run, folder: StageFolder, meter: Meter) -> Summary:
    """A whole model folder, made of what training exported; that is here too if it is moved further (ExPO).

    Where nothing was trained it is the start model.
    """
    from rdpo.modeling.saving import copy_tokenizer
    from rdpo.modeling.student import weights_of_start
    from rdpo.modeling.weights import ModelRef, local_adapter
    from rdpo.training.checkpoint import EXPORT, MERGED, finish_policy
    from rdpo.training.extrapolation import extrapolate

    student, alpha = ModelRef.student(run.job), run.job.training.extrapolation
    trained = exported(run, "training")

    meter.advance(1)
    if trained is None:
        folder.put(student.folder(), MERGED)
        return {}
    base = weights_of_start(run.job).folder()

    if alpha:
        folder.put(trained, EXPORT)
        with folder.made(EXPORT, keep=True) as moved:
            extrapolate(moved, base, alpha, student.trust)
    with folder.made(MERGED) as merged:
        compared = finish_policy(exported(run, "policy") or trained, base, merged, student.trust)
        if student.adapter:
            # In a tokenizer that lies beside it the student was trained, whatever the base has.
            copy_tokenizer(local_adapter(student.adapter), merged)
    return {"extrapolation": alpha, **compared}


def exported(run: RunReader, stage: str) -> Path | None:
    """The adapter or weights, as training exports them, that a stage holds; None if it holds none."""
    from rdpo.training.checkpoint import EXPORT

    folder = run.folder(stage)
    return Path(folder.local(EXPORT)) if folder.exists(EXPORT) else None


STAGE = Stage(
    "policy",
    inputs=("training",),
    settings=settings,
    execute=complete_policy,
    reads={"training": Reads(below="policy/")},
    id_column=None,
    unit="model",
    command="merge",
)
