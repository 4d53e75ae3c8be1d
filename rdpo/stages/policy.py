"""Training, and what becomes of its policy: the whole model, retention, evaluation, the published model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpo.cluster.installed import versions
from rdpo.errors import InputError
from rdpo.execution.run import Run
from rdpo.files.stage_folder import METRICS, StageFolder, write_rows
from rdpo.files.stores import is_remote
from rdpo.records import ID_COLUMN, Row, alive, digest, table_of
from rdpo.stages import settings as lineage
from rdpo.stages.names import job_stages
from rdpo.tracking.console import Meter

if TYPE_CHECKING:
    import ray.data


def train_policy(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    """The policy as it leaves training; the first and the last step's metrics.

    Raises:
        InputError: there is no step to take, or none had a finite gradient.
    """
    from rdpo.training.gaps import GapScale, advice
    from rdpo.training.loop import PairTable
    from rdpo.training.schedule import total_steps
    from rdpo.training.trainer import train

    job, data = run.job, PairTable.load(run.dir)
    if job.training.max_steps == 0:
        folder.write_bytes(METRICS, b"")
        return {"steps": 0, "pairs": 0}
    meter.total = total_steps(len(data), job)
    if not meter.total:
        raise InputError(f"training: {len(data)} pairs make no optimizer step; add prompts or lower batch_size")
    gaps = data.table["reward_gap"].to_pylist()
    if warning := advice(gaps, GapScale.fitted(gaps, job.training.reward_norm), job.training):
        run.console.warn(warning)
    history = train(job, run.dir, folder, lambda metrics: _step(meter, metrics), run.console.warn)
    taken = [step for step in history if not step["skipped"]]
    if not taken:
        raise InputError("training: every step had a loss or gradient that is not finite; lower training.learning_rate")
    told = {"steps": len(taken), "pairs": len(data), "first": taken[0], "last": taken[-1]}
    return {**told, **_selected(run, history), **_heldout(run, folder)}


def complete_policy(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    """A whole model folder, made of what training exported; that is here too if it is moved further (ExPO).

    Where nothing was trained it is the start model.
    """
    from rdpo.modeling.weights import local_model
    from rdpo.training.checkpoint import EXPORT, MERGED, finish_policy
    from rdpo.training.extrapolation import extrapolate

    student, alpha = run.job.student, run.job.training.extrapolation
    base, trained = local_model(student.model, student.revision), _exported(run, "training")
    meter.advance(1)
    if trained is None:
        folder.put(base, MERGED)
        return {}
    if alpha:
        folder.put(trained, EXPORT)
        with folder.made(EXPORT, keep=True) as moved:
            extrapolate(moved, base, alpha)
    with folder.made(MERGED) as merged:
        finish_policy(_exported(run, "policy") or trained, base, merged, student.trust_remote_code)
    return {"extrapolation": alpha}


def _exported(run: Run, stage: str) -> Path | None:
    """The adapter or weights, as training exports them, that a stage holds; None if it holds none."""
    from rdpo.training.checkpoint import EXPORT

    folder = run.folder(stage)
    return Path(folder.local(EXPORT)) if folder.exists(EXPORT) else None


def _selected(run: Run, history: list[dict[str, float]]) -> dict[str, int]:
    """The step whose weights leave training, where they are selected; says so."""
    from rdpo.training.heldout import LOSS, best_step

    step = best_step(history)
    if run.job.training.select == "last" or not step:
        return {}
    loss = history[step - 1][LOSS]
    run.console.say(f"{'':<12}the weights after step {step} leave: held-out loss {loss:.4f}, the lowest")
    return {"selected": step}


def _heldout(run: Run, folder: StageFolder) -> dict[str, Any]:
    """How often the policy prefers the chosen side of held-out pairs, if there are any; says so."""
    import numpy as np

    from rdpo.training.heldout import correct
    from rdpo.training.trainer import heldout_margins

    margins = np.array(list(heldout_margins(folder).values()))
    if not len(margins):
        return {}
    right = float(correct(margins).mean())
    run.console.say(f"{'':<12}prefers the chosen side of {right:.2f} of {len(margins)} held-out pairs")
    return {"heldout": {"pairs": len(margins), "accuracy": right, "margin": float(margins.mean())}}


def _step(meter: Meter, metrics: dict[str, float]) -> None:
    meter.done = int(metrics["step"]) - 1
    note = f"loss {metrics['loss']:.4f}  margin {metrics['rewards/margins']:.3f}"
    meter.advance(1, int(metrics["tokens"]), note)
    meter.console.step(metrics)


def measure_retention(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    """How much likelihood other texts have lost; says so.

    Raises:
        InputError: none of them can be used.
    """
    from rdpo.evaluation.retention import measured, summary, texts
    from rdpo.training.checkpoint import MERGED

    assert run.job.retention is not None
    folder.clear_parts()
    rows = texts(run.job, run.job.retention)
    if not any(map(alive, rows)):
        raise InputError(f"retention: no usable conversation in {run.job.retention.source}; {rows[0]['dropped']}")
    trained = run.folder("policy").address(MERGED)
    write_rows(
        measured(rows, run.job, trained), folder, ID_COLUMN, lambda block: meter.advance(block.rows + block.dropped)
    )
    told = summary(folder.table().sort_by(ID_COLUMN).to_pylist(), run.job.seed)
    factor = told["perplexity_factor"]
    interval = f"{factor['low']:.3f} to {factor['high']:.3f}"
    run.console.say(f"{'':<12}perplexity of {told['texts']} other texts: {factor['mean']:.3f} times ({interval})")
    return {"rows_in": len(rows), **told}


def evaluation_summary(run: Run, folder: StageFolder) -> dict[str, Any]:
    """Start model and trained model compared by every reward."""
    from rdpo.evaluation.compare import summarize

    weights = {reward.name: reward.weight for reward in run.job.rewards}
    evaluated = folder.table().sort_by(ID_COLUMN).to_pylist() if folder.parts() else []
    return summarize(evaluated, weights, run.job.seed)


def evaluate(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    """Answers of both models, their scores and the divergence."""
    import ray.data

    from rdpo.evaluation.generate import START, TRAINED, add_divergence, answer_prompts
    from rdpo.modeling.weights import local_model
    from rdpo.preference.rewards import score_answers
    from rdpo.training.checkpoint import MERGED

    job = run.job
    student = job.student
    # A store's name holds on every machine of a cluster; the place of this machine's copy does not.
    start = student.model if is_remote(student.model) else str(local_model(student.model, student.revision))
    trained = run.folder("policy").address(MERGED)
    known = {START: _start_answers(run)}
    answered = answer_prompts(rows.take_all(), job, {START: start, TRAINED: trained}, known)
    scored = score_answers(ray.data.from_arrow(table_of(answered)), job, [START, TRAINED]).materialize()
    return add_divergence(scored, job, trained, TRAINED)


def _start_answers(run: Run) -> dict[str, Row]:
    """The start model's answers by prompt, as far as a sibling has them."""
    from rdpo.evaluation.generate import START, answer_columns

    own, columns = digest(lineage.start_answers(run.job)), [ID_COLUMN, *answer_columns(START)]
    made = run.made_by_siblings("evaluation")
    same = (folder for folder, settings in made if digest(settings.get("start")) == own and folder.parts())
    return {row.pop(ID_COLUMN): row for folder in same for row in folder.table(columns=columns).to_pylist()}


def publish_model(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    """The Hugging Face folder, reloaded and compared; what was checked."""
    from rdpo.evaluation.publish import publish
    from rdpo.training.checkpoint import MERGED

    inputs = {stage: run.manifest(stage, "model") for stage in job_stages(run.job)[:-1]}
    facts = {
        "version": versions()["rdpo"],
        "evaluation": inputs["evaluation"].summary,
        "pairs": inputs["reference"].rows_out,
        "lineage": {name: manifest.digest for name, manifest in inputs.items()},
    }
    policy = run.folder("policy")
    # The start model itself has no adapter or weights of its own.
    exported = _exported(run, "policy") or _exported(run, "training")
    with folder.made() as target:
        checks = publish(run.job, exported, Path(policy.local(MERGED)), target, facts)
    meter.advance(1, note=f"reloaded; logits differ by {checks['logit_difference']:.1e}")
    return checks
