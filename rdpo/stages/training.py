"""Training: pairs to the weights of the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdpo.errors import InputError
from rdpo.execution.stage import Reads, Stage
from rdpo.records import HELDOUT, ID_COLUMN, digest
from rdpo.stages.settings import student_settings

if TYPE_CHECKING:
    from rdpo.config import Job
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings, Summary
    from rdpo.files.stage_folder import StageFolder
    from rdpo.tracking.console import Meter
    from rdpo.training.loop import PairTable


READ = (
    *(ID_COLUMN, HELDOUT, "prompt_ids", "chosen_ids", "rejected_ids", "reward_gap"),
    *("reference_chosen_logps", "reference_rejected_logps"),
    *("others_ids", "reference_others_logps", "gap_others"),
)
"""The columns that training reads: those of `rdpo.training.loop.PairTable`."""


def settings(job: Job) -> Settings:
    """Settings of the training stage, with the weights of the rows where it has some.

    Raises:
        InputError: these cannot be read.
    """
    from rdpo.training.row_weights import read_weights

    found = job.training.model_dump(exclude={"extrapolation"})
    if job.training.select == "best":
        # Only what is a checkpoint can be the best one.
        found["select_among_every"] = job.training.checkpoint_every
    if job.training.row_weights:
        found["row_weights_content"] = digest(sorted(read_weights(job.training.row_weights).items()))
    return {**found, "student": student_settings(job), "seed": job.seed}


def train_policy(run: Run, folder: StageFolder, meter: Meter) -> Summary:
    """The policy as it leaves training; the first and the last step's metrics.

    Raises:
        InputError: there is no step to take, or none had a finite gradient.
    """
    from rdpo.files.stage_folder import METRICS
    from rdpo.preference.reference import as_referred
    from rdpo.training.gaps import GapScale, advice
    from rdpo.training.loop import PairTable
    from rdpo.training.schedule import total_steps
    from rdpo.training.trainer import train

    job, data = run.job, PairTable.weighted(run.dir, run.job)
    if job.training.max_steps == 0:
        folder.write_bytes(METRICS, b"")
        return {"steps": 0, "pairs": 0}

    meter.total = total_steps(len(data), job)
    if not meter.total:
        raise InputError(f"training: {len(data)} pairs make no optimizer step; add prompts or lower batch_size")

    referred = as_referred(job, run.dir)
    check_room(data, referred)
    gaps = data.gaps
    if warning := advice(gaps, GapScale.fitted(gaps, job.training.reward_norm), job.training):
        run.console.warn(warning)

    history = train(referred, run.dir, folder, lambda metrics: _step(meter, metrics), run.console.warn)
    taken = [step for step in history if not step["skipped"]]
    if not taken:
        raise InputError("training: every step had a loss or gradient that is not finite; lower training.learning_rate")

    summary = {"steps": len(taken), "pairs": len(data), "first": taken[0], "last": taken[-1]}
    return {**summary, **_selected(run, history), **_heldout(run, folder)}


def check_room(data: PairTable, job: Job) -> None:
    """Hold the groups against the budget of a forward, in which each must have room.

    Raises:
        InputError: the largest one has more tokens.
    """
    from rdpo.modeling.packing import batch_tokens

    packed, budget = job.training.layout == "packed", job.training.tokens_per_batch
    sizes = [batch_tokens([size], packed) if size.others else 0 for size in data.sizes]
    largest = max(range(len(sizes)), key=sizes.__getitem__, default=0)
    if sizes and sizes[largest] > budget:
        name = data.rows((largest,))[ID_COLUMN][0]
        raise InputError(
            f"training.tokens_per_batch = {budget}: the {len(data.sizes[largest].answers)} answers of the group {name} "
            f"have {sizes[largest]} tokens; raise it, or lower reference.max_length or the number of samples"
        )


def _step(meter: Meter, metrics: dict[str, float]) -> None:
    meter.done = int(metrics["step"]) - 1
    note = f"loss {metrics['loss']:.4f}  margin {metrics['rewards/margins']:.3f}"
    meter.advance(1, int(metrics["tokens"]), note)
    meter.console.step(metrics)


def _selected(run: Run, history: list[dict[str, float]]) -> dict[str, int]:
    """The step whose weights leave training, where they are selected; says so."""
    from rdpo.training.heldout import LOSS, best_step

    step = best_step(history)
    if run.job.training.select == "last" or not step:
        return {}
    loss = history[step - 1][LOSS]
    run.console.say(f"{'':<12}the weights after step {step} leave: held-out loss {loss:.4f}, the lowest")
    return {"selected": step}


def _heldout(run: Run, folder: StageFolder) -> Summary:
    """How often the policy prefers the chosen side of held-out pairs, if there are any; says so."""
    import numpy as np

    from rdpo.training.heldout import correct
    from rdpo.training.trainer import heldout_margins

    margins = np.array(list(heldout_margins(folder).values()))
    if not len(margins):
        return {}
    right = float(correct(margins).mean())
    note = ", which selected the weights, so that this is too high" if run.job.training.select == "best" else ""
    run.console.say(f"{'':<12}prefers the chosen side of {right:.2f} of {len(margins)} held-out pairs{note}")
    return {"heldout": {"pairs": len(margins), "accuracy": right, "margin": float(margins.mean())}}


STAGE = Stage(
    "training",
    inputs=("reference",),
    settings=settings,
    execute=train_policy,
    reads={"reference": Reads(columns=READ)},
    packages=("rdpo", "torch", "transformers", "deepspeed", "peft"),
    id_column=None,
    unit="steps",
    command="train",
)
