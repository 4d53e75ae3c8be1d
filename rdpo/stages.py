"""What each stage does, in the order in which data passes: the wiring between the rooms and the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpo import lineage
from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.pipeline import Run, Stage
from rdpo.records import table_of
from rdpo.storage import StageFolder, WriteProgress, write_rows
from rdpo.tracking import Meter

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data


def prepare(job: Job) -> None:
    """Try models, task and rewards, and start Ray, before any long work.

    Raises:
        InputError: something the job names cannot be used.
    """
    from rdpo.cluster import check_devices, start_ray
    from rdpo.policy.chat import load_chat
    from rdpo.policy.models import local_model
    from rdpo.preference.rewards import check_rewards
    from rdpo.synthesis.endpoint import check_endpoint
    from rdpo.synthesis.given import SIDES
    from rdpo.synthesis.instructions import check_prefills, load_task
    from rdpo.synthesis.teacher import teacher_model

    names = [turn.name for turn in load_task(job.synthesis.task).turns] if job.synthesis.task else SIDES
    for side in (job.pairs.chosen, job.pairs.rejected):
        if side not in names:
            raise InputError(
                f"pairs: {job.synthesis.task or 'the data'} has no answer `{side}`; it has {', '.join(names)}"
            )
    local_model(job.student.model, job.student.revision)
    load_chat(job.student.model, job.student.revision, job.student.trust_remote_code)
    if not job.synthesis.endpoint:
        local_model(teacher_model(job))
    elif job.synthesis.task:
        check_endpoint(job.synthesis.endpoint)
        check_prefills(load_task(job.synthesis.task))
    check_rewards(job)
    check_devices(job, start_ray(job))


def _rows_stage(
    run: Run,
    folder: StageFolder,
    meter: Meter,
    source: Source,
    make: Callable[[ray.data.Dataset, Job], ray.data.Dataset],
    generates: bool = False,
) -> dict[str, Any]:
    """Run a stage that maps rows to rows, leaving out those that an interrupted run has stored.

    `generates`: the rows' `*_tokens` are this stage's work and count for its rate.
    """
    done = folder.done_ids("prompt_id")
    meter.total = len(source.ids)
    meter.advance(len(done))
    rows = source.rows()
    if done:
        rows = rows.filter(lambda row: row["prompt_id"] not in done)
    if len(done) < len(source.ids):
        write_rows(make(rows, run.job), folder, "prompt_id", lambda block: _count(meter, block, generates))
    return {"rows_in": len(source.ids)}


@dataclass(frozen=True)
class Source:
    """The rows that enter a stage, and their ids."""

    rows: Callable[[], ray.data.Dataset]
    ids: list[str]


def _stage_source(run: Run, stage: str) -> Source:
    folder = run.folder(stage)
    ids = folder.table(columns=["prompt_id"])["prompt_id"].to_pylist() if folder.parts() else []
    return Source(folder.dataset, ids)


def _split_table(run: Run, split: str) -> pa.Table:
    """The prompts of one split, in the order of their ids."""
    import pyarrow.compute as pc

    table = run.folder("prompts").table().sort_by("prompt_id")
    return table.filter(pc.equal(table["split"], split))


def _table_source(table: pa.Table) -> Source:
    import ray.data

    return Source(lambda: ray.data.from_arrow(table), table["prompt_id"].to_pylist())


def _count(meter: Meter, block: WriteProgress, generates: bool) -> None:
    meter.advance(block.rows + block.dropped, block.tokens if generates else 0)


def _prompts(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    from rdpo.synthesis.prompts import read_prompts

    folder.clear()
    rows = read_prompts(run.job)
    count = rows.count()
    meter.total = count
    write_rows(rows, folder, "prompt_id", lambda block: meter.advance(block.rows + block.dropped))
    kept = folder.table(columns=["split"]) if folder.parts() else None
    splits = kept["split"].to_pylist() if kept else []
    for split in (run.job.synthesis.split, "heldout"):
        if split not in splits:
            reasons = folder.table("dropped")
            why = f"; {reasons['dropped'][0]}" if reasons.num_rows else ""
            raise InputError(f"prompts: no usable prompt in the {split} split of {run.job.prompts.source}{why}")
    return {"rows_in": count, "splits": {split: splits.count(split) for split in sorted(set(splits))}}


def _synthesis(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    from rdpo.synthesis.endpoint import endpoint_cost
    from rdpo.synthesis.given import given_answers
    from rdpo.synthesis.instructions import check_fields, load_task
    from rdpo.synthesis.teacher import synthesize

    table = _split_table(run, run.job.synthesis.split).slice(0, run.job.synthesis.limit)
    if not run.job.synthesis.task:
        return _rows_stage(run, folder, meter, _table_source(table), given_answers)
    check_fields(load_task(run.job.synthesis.task), table.slice(0, 1).to_pylist()[0])
    counted = _rows_stage(run, folder, meter, _table_source(table), synthesize, generates=True)
    if run.job.synthesis.endpoint:
        asked = [*(folder.table().to_pylist() if folder.parts() else []), *folder.table("dropped").to_pylist()]
        counted |= endpoint_cost(asked, run.job.synthesis.endpoint.price_per_million)
        run.console.say(f"{'':<11}endpoint: {counted['tokens_read']} tokens read, cost {counted['cost']:.2f}")
    return counted


def _rewards(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    from rdpo.preference.rewards import score_answers

    answers = [run.job.pairs.chosen, run.job.pairs.rejected]
    source = _stage_source(run, "synthesis")
    return _rows_stage(run, folder, meter, source, lambda rows, job: score_answers(rows, job, answers))


def _pairs(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    from rdpo.preference.pairs import agreement, make_pairs
    from rdpo.synthesis.defects import count_defects

    counted = _rows_stage(run, folder, meter, _stage_source(run, "rewards"), make_pairs)
    scored = run.folder("rewards").table() if counted["rows_in"] else None
    counted["agreement"] = agreement(scored.to_pylist(), run.job.pairs) if scored else {}
    if scored and run.job.synthesis.task:
        counted["defects"] = count_defects(scored.to_pylist(), run.job.pairs.rejected, run.job.pairs.chosen)
        for defect, count in counted["defects"].items():
            run.console.say(f"{'':<11}{count} of {len(scored)} conversations: {defect}")
    for reward, share in counted["agreement"].items():
        run.console.say(f"{'':<11}{reward} prefers {run.job.pairs.chosen} to {run.job.pairs.rejected}: {share:.2f}")
    return counted


def _reference(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    from rdpo.preference.reference import add_reference

    source = _stage_source(run, "pairs")
    if not source.ids:
        raise InputError("pairs: no pair is left to train on; see the dropped reasons of the pairs stage")
    return _rows_stage(run, folder, meter, source, add_reference)


def _training(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    from rdpo.policy.models import local_model
    from rdpo.training.checkpoint import EXPORT, MERGED, finish_policy
    from rdpo.training.gaps import GapScale, advice
    from rdpo.training.loop import PairTable, total_steps
    from rdpo.training.trainer import train

    job, data = run.job, PairTable.load(run.dir)
    meter.total = total_steps(len(data), job)
    if not meter.total:
        raise InputError(f"training: {len(data)} pairs make no optimizer step; add prompts or lower batch_size")
    gaps = data.table["reward_gap"].to_pylist()
    if warning := advice(gaps, GapScale.fitted(gaps, job.training.reward_norm), job.training):
        run.console.say(f"{'':<11}warning: {warning}")
    history = train(job, run.dir, folder, lambda metrics: _step(meter, metrics))
    base = local_model(job.student.model, job.student.revision)
    exported, merged = Path(folder.local(EXPORT)), Path(folder.local(MERGED))
    finish_policy(exported, base, merged)
    taken = [step for step in history if not step["skipped"]]
    if not taken:
        raise InputError("training: every step had a loss or gradient that is not finite; lower training.learning_rate")
    return {"steps": len(taken), "pairs": len(data), "first": taken[0], "last": taken[-1]}


def _step(meter: Meter, metrics: dict[str, float]) -> None:
    meter.done = int(metrics["step"]) - 1
    note = f"loss {metrics['loss']:.4f}  margin {metrics['rewards/margins']:.3f}"
    meter.advance(1, int(metrics["tokens"]), note)


def _evaluation(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    from rdpo.evaluation.compare import summarize

    source = _table_source(_split_table(run, "heldout").slice(0, run.job.evaluation.limit))
    counted = _rows_stage(run, folder, meter, source, lambda rows, job: _evaluated(run, rows), generates=True)
    weights = {reward.name: reward.weight for reward in run.job.rewards}
    evaluated = folder.table().sort_by("prompt_id").to_pylist() if folder.parts() else []
    return {**counted, **summarize(evaluated, weights, run.job.seed)}


def _evaluated(run: Run, rows: ray.data.Dataset) -> ray.data.Dataset:
    """Answers of both models, their scores and the divergence."""
    import ray.data

    from rdpo.evaluation.generate import add_divergence, answer_prompts
    from rdpo.policy.models import local_model
    from rdpo.preference.rewards import score_answers
    from rdpo.training.checkpoint import MERGED

    job = run.job
    start = str(local_model(job.student.model, job.student.revision))
    trained = run.folder("training").local(MERGED)
    answered = answer_prompts(rows.take_all(), job, {"start": start, "trained": trained})
    scored = score_answers(ray.data.from_arrow(table_of(answered)), job, ["start", "trained"]).materialize()
    return add_divergence(scored, job, trained, "trained")


def _publish(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    from rdpo.evaluation.publish import publish

    inputs = {stage.name: run.manifest(stage.name, "model") for stage in STAGES[:-1]}
    facts = {
        "version": lineage.versions()["rdpo"],
        "evaluation": inputs["evaluation"].summary,
        "pairs": inputs["reference"].rows_out,
        "lineage": {name: manifest.digest for name, manifest in inputs.items()},
    }
    training = Path(run.folder("training").local())
    checks = publish(run.job, training, Path(folder.local()), facts)
    meter.advance(1, note=f"reloaded; logits differ by {checks['logit_difference']:.1e}")
    return checks


STAGES = (
    Stage("prompts", (), lineage.prompts, _prompts),
    Stage("synthesis", ("prompts",), lineage.synthesis, _synthesis),
    Stage("rewards", ("synthesis",), lineage.rewards, _rewards),
    Stage("pairs", ("rewards",), lineage.pairs, _pairs),
    Stage("reference", ("pairs",), lineage.reference, _reference),
    Stage("training", ("reference",), lineage.training, _training, None, "steps"),
    Stage("evaluation", ("prompts", "training"), lineage.evaluation, _evaluation),
    Stage("model", ("training", "evaluation"), lineage.publish, _publish, None, "model"),
)
