"""What each stage does, in the order in which data passes: the wiring between the rooms and the run."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpo import lineage
from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.pipeline import Run, Stage
from rdpo.records import table_of
from rdpo.storage import TOKENS, StageFolder, write_rows
from rdpo.streaming import ID, RowWork, Source, stage_source
from rdpo.tracking import Meter

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

    from rdpo.preference.shaping import Shaping

HELDOUT = "heldout"
PROMPT_LENGTH = "_prompt_length"


def prepare(job: Job) -> bool:
    """Try models, task and rewards, and start Ray, before any long work; whether its pools fit side by side.

    Raises:
        InputError: something the job names cannot be used.
    """
    from rdpo.cluster import check_devices, fit_side_by_side, start_ray
    from rdpo.policy.chat import load_chat
    from rdpo.policy.models import local_model
    from rdpo.preference.rewards import check_rewards
    from rdpo.synthesis.prompts import check_templates

    check_templates(job.prompts)
    local_model(job.student.model, job.student.revision)
    load_chat(job.student.model, job.student.revision, job.student.trust_remote_code)
    _check_teacher(job)
    check_rewards(job)
    gpus = check_devices(job, start_ray(job))
    return fit_side_by_side(job, gpus)


def _check_teacher(job: Job) -> None:
    from rdpo.policy.models import local_model
    from rdpo.preference.pairs import scored_answers
    from rdpo.synthesis.endpoint import check_endpoint
    from rdpo.synthesis.instructions import beginning, check_prefills, load_task
    from rdpo.synthesis.teacher import teacher_model

    scored_answers(job)
    for section, condition in (("pairs", job.pairs.condition), ("evaluation", job.evaluation.condition)):
        if condition:
            beginning(load_task(job.synthesis.task or ""), condition, f"{section}.condition")
    if not job.synthesis.endpoint:
        local_model(teacher_model(job))
    elif job.synthesis.task:
        check_endpoint(job.synthesis.endpoint)
        check_prefills(load_task(job.synthesis.task))


def _prompts(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    from rdpo.synthesis.prompts import drop_twins, read_prompts

    folder.clear_parts()
    write_rows(read_prompts(run.job), folder, ID, lambda block: meter.advance(block.rows + block.dropped))
    drop_twins(folder)
    splits = _splits(folder)
    for split in (run.job.synthesis.split, HELDOUT):
        if split not in splits:
            reason = next((table["dropped"][0] for table in folder.tables("dropped")), None)
            why = f"; {reason}" if reason else ""
            raise InputError(f"prompts: no usable prompt in the {split} split of {run.job.prompts.source}{why}")
    return {"rows_in": meter.done, "splits": splits}


def _calibration(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    from rdpo.preference.calibration import calibrate, check_calibration, right_sides, tried_rewards

    folder.clear_parts()
    for rows in calibrate(run.job) if tried_rewards(run.job) else ():
        write_rows(rows, folder, ID, lambda block: meter.advance(block.rows + block.dropped))
    check_calibration(folder.count(), folder.reasons(), run.job)
    shares = right_sides(folder.tables(), run.job)
    for reward, share in shares.items() if run.job.calibration.source else ():
        run.console.say(f"{'':<12}{reward} prefers the better answer in {share:.2f} of the known pairs")
    return {"right": shares}


def _splits(folder: StageFolder) -> dict[str, int]:
    import pyarrow.compute as pc

    counted: Counter[str] = Counter()
    for table in folder.tables(columns=["split"]):
        counted.update({entry["values"]: entry["counts"] for entry in pc.value_counts(table["split"]).to_pylist()})
    return dict(sorted(counted.items()))


def _split_source(run: Run, split: str, limit: int | None) -> Source:
    """The prompts of one split, at most so many: the first by id."""
    import pyarrow.compute as pc

    folder = run.folder("prompts")
    count, last = _splits(folder).get(split, 0), None
    if limit is not None and limit < count:
        ids = _split_ids(folder, split)
        count, last = limit, ids[pc.sort_indices(ids)[limit - 1].as_py()].as_py()

    def chosen(batch: pa.Table) -> pa.Table:
        wanted = pc.equal(batch["split"], split)
        return batch.filter(wanted if last is None else pc.and_(wanted, pc.less_equal(batch[ID], last)))

    def ids_of() -> pa.ChunkedArray:
        ids = _split_ids(folder, split)
        return ids if last is None else ids.filter(pc.less_equal(ids, last))

    return Source(lambda: folder.dataset().map_batches(chosen, batch_format="pyarrow"), count, ids_of)


def _split_ids(folder: StageFolder, split: str) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = [part.filter(pc.equal(part["split"], split))[ID] for part in folder.tables(columns=[ID, "split"])]
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())


def _training_prompts(run: Run) -> Source:
    return _split_source(run, run.job.synthesis.split, run.job.synthesis.limit)


def _write_answers(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    from rdpo.synthesis.given import given_answers
    from rdpo.synthesis.instructions import check_fields, load_task
    from rdpo.synthesis.teacher import synthesize

    if not run.job.synthesis.task:
        return given_answers(rows, run.job)
    first = next(run.folder("prompts").tables()).slice(0, 1)
    check_fields(load_task(run.job.synthesis.task), first.to_pylist()[0], run.job.synthesis.values)
    return synthesize(rows, run.job)


def _synthesis_summary(run: Run, folder: StageFolder) -> dict[str, Any]:
    from rdpo.synthesis.endpoint import cost

    if not (run.job.synthesis.endpoint and run.job.synthesis.task):
        return {}
    read, written = (folder.total(of) + folder.total(of, "dropped") for of in (PROMPT_LENGTH, TOKENS))
    price = cost(read, written, run.job.synthesis.endpoint.price_per_million)
    run.console.say(f"{'':<12}endpoint: {read} tokens read, cost {price:.2f}")
    return {"tokens_read": read, "tokens_written": written, "cost": price}


def _score(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    from rdpo.preference.pairs import scored_answers
    from rdpo.preference.rewards import score_answers

    return score_answers(rows, run.job, scored_answers(run.job), run.streams)


def _scored(run: Run) -> Source:
    """The scored rows, each as often as it makes pairs."""
    from rdpo.preference.pairs import copies, copy_names

    source, count = stage_source(run, "rewards"), 1 + len(run.job.pairs.also)
    if count == 1:
        return source
    rows = partial(copies, count=count)
    return Source(
        lambda: source.rows().map_batches(rows, batch_format="pyarrow"),
        source.count * count,
        lambda: copy_names(source.ids(), count),
    )


def _make_pairs(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    from rdpo.preference.pairs import make_pairs

    shaping = _shaping(run)
    return make_pairs(rows, run.job, shaping.length_coef if shaping else 0.0)


def _shaping(run: Run) -> Shaping | None:
    from rdpo.preference.pairs import shaping_of

    return shaping_of(run.folder("rewards").tables(), run.job.pairs)


def _pairs_summary(run: Run, folder: StageFolder) -> dict[str, Any]:
    from rdpo.preference.agreement import COLUMNS, agreement, count_defects

    settings = run.job.pairs
    # Only the columns that count are read: the texts would stay in the driver's memory.
    agreed = agreement(chain(*(folder.tables(below, COLUMNS) for below in ("", "dropped"))), settings)
    found = count_defects(chain(*(folder.tables(below, ["defects"]) for below in ("", "dropped"))))
    rows = folder.count() + folder.count("dropped")
    for defect, count in found.items():
        run.console.say(f"{'':<12}{count} of {rows} conversations: {defect}")
    for reward, sides in agreed.items():
        means = f"means {sides.chosen_mean:.2f} and {sides.rejected_mean:.2f}"
        run.console.say(
            f"{'':<12}{reward} prefers {settings.chosen} to {settings.rejected}: {sides.preferred:.2f}; {means}"
        )
        if sides.constant:
            run.console.say(f"{'':<12}warning: {reward} gives every answer the same score; it tells nothing here")
    told: dict[str, Any] = {"agreement": {reward: asdict(sides) for reward, sides in agreed.items()}}
    if shaping := _shaping(run):
        told["shaping"] = asdict(shaping)
        gap = f"the best are {shaping.mean_length_gap:+.1f} characters longer than the worst"
        run.console.say(f"{'':<12}a character costs {shaping.length_coef:g}: {gap}")
    return {**told, "defects": found} if run.job.synthesis.task else told


def _reference(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    from rdpo.preference.reference import add_reference

    return add_reference(rows, run.job)


def _replay(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    from rdpo.preference.replay import draw_mix, keyed, offline_pairs, usable, with_reasons

    assert run.job.replay is not None
    folder.clear_parts()
    pairs, heldout = run.folder("pairs"), _split_ids(run.folder("prompts"), HELDOUT).to_pylist()
    ready = offline_pairs(run.job, run.job.replay).materialize()
    offline = keyed(ready.map_batches(usable, batch_format="pyarrow").iter_batches(batch_format="pyarrow"))
    generated = keyed(pairs.tables(columns=[ID, "prompt"]))
    mix = draw_mix(generated, offline, frozenset(heldout), run.job.replay.share, run.job.seed)
    schema = pairs.schema() if generated else ready.schema().base_schema
    told = ready.map_batches(with_reasons, fn_kwargs={"reasons": mix.reasons, "schema": schema}, batch_format="pyarrow")
    write_rows(told, folder, ID, lambda block: meter.advance(block.rows + block.dropped))
    run.console.say(f"{'':<12}{mix.generated} generated pairs and {mix.offline} ready ones")
    return {"rows_in": ready.count(), "generated": mix.generated, "last": mix.last}


def _drawn_pairs(run: Run) -> Source:
    """The pairs that are trained on: all generated ones, or those of the mix with ready ones."""
    from rdpo.preference.replay import place, until

    generated = stage_source(run, "pairs")
    if run.job.replay is None:
        return generated
    ready, seed = stage_source(run, "replay"), run.job.seed
    mix = run.manifest("replay", "reference").summary
    last = mix["last"]

    def rows() -> ray.data.Dataset:
        parts = [generated.rows()] if mix["generated"] else []
        if last and parts:
            parts[0] = parts[0].map_batches(until, fn_kwargs={"last": last, "seed": seed}, batch_format="pyarrow")
        parts += [ready.rows()] if ready.count else []
        return parts[0].union(*parts[1:])

    def ids() -> pa.ChunkedArray:
        import pyarrow as pa

        drawn = [name for name in generated.ids().to_pylist() if last is None or place(name, seed) <= last]
        return pa.chunked_array([pa.array(drawn, pa.string()), *ready.ids().chunks])

    return Source(rows, mix["generated"] + ready.count, ids)


def _pairs_source(run: Run) -> Source:
    source = _drawn_pairs(run)
    if not source.count:
        raise InputError("pairs: no pair is left to train on; see the dropped reasons of the pairs stage")
    return source


def _training(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    from rdpo.policy.models import local_model
    from rdpo.training.checkpoint import EXPORT, MERGED, finish_policy
    from rdpo.training.extrapolation import extrapolate
    from rdpo.training.gaps import GapScale, advice
    from rdpo.training.loop import PairTable, total_steps
    from rdpo.training.trainer import heldout_margins, train

    job, data = run.job, PairTable.load(run.dir)
    if job.training.max_steps == 0:
        return _untrained(run, folder)
    meter.total = total_steps(len(data), job)
    if not meter.total:
        raise InputError(f"training: {len(data)} pairs make no optimizer step; add prompts or lower batch_size")
    gaps = data.table["reward_gap"].to_pylist()
    if warning := advice(gaps, GapScale.fitted(gaps, job.training.reward_norm), job.training):
        run.console.say(f"{'':<12}warning: {warning}")
    history = train(job, run.dir, folder, lambda metrics: _step(meter, metrics))
    base = local_model(job.student.model, job.student.revision)
    exported, merged = Path(folder.local(EXPORT)), Path(folder.local(MERGED))
    if job.training.extrapolation:
        extrapolate(exported, base, job.training.extrapolation)
    finish_policy(exported, base, merged)
    taken = [step for step in history if not step["skipped"]]
    if not taken:
        raise InputError("training: every step had a loss or gradient that is not finite; lower training.learning_rate")
    told = {"steps": len(taken), "pairs": len(data), "first": taken[0], "last": taken[-1]}
    if margins := heldout_margins(folder):
        right = sum(margin > 0 for margin in margins.values()) / len(margins)
        run.console.say(f"{'':<12}prefers the chosen side of {right:.2f} of {len(margins)} held-out pairs")
        told["heldout"] = {"pairs": len(margins), "accuracy": right, "margin": sum(margins.values()) / len(margins)}
    return told


def _untrained(run: Run, folder: StageFolder) -> dict[str, Any]:
    """The start model as the policy that leaves training."""
    from rdpo.policy.models import local_model
    from rdpo.training.checkpoint import MERGED
    from rdpo.training.trainer import METRICS

    start = local_model(run.job.student.model, run.job.student.revision)
    shutil.copytree(start, folder.local(MERGED), dirs_exist_ok=True)
    folder.write_bytes(METRICS, b"")
    return {"steps": 0, "pairs": 0}


def _step(meter: Meter, metrics: dict[str, float]) -> None:
    meter.done = int(metrics["step"]) - 1
    note = f"loss {metrics['loss']:.4f}  margin {metrics['rewards/margins']:.3f}"
    meter.advance(1, int(metrics["tokens"]), note)


def _retention(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    from rdpo.evaluation.retention import measured, summary, texts
    from rdpo.training.checkpoint import MERGED

    assert run.job.retention is not None
    folder.clear_parts()
    rows = texts(run.job, run.job.retention)
    trained = run.folder("training").local(MERGED)
    write_rows(measured(rows, run.job, trained), folder, ID, lambda block: meter.advance(block.rows + block.dropped))
    told = summary(folder.table().sort_by(ID).to_pylist() if folder.parts() else [], run.job.seed)
    if not told["texts"]:
        raise InputError(f"retention: no usable conversation in {run.job.retention.source}; {folder.reasons()}")
    factor = told["perplexity_factor"]
    interval = f"{factor['low']:.3f} to {factor['high']:.3f}"
    run.console.say(f"{'':<12}perplexity of {told['texts']} other texts: {factor['mean']:.3f} times ({interval})")
    return {"rows_in": len(rows), **told}


def _evaluation_summary(run: Run, folder: StageFolder) -> dict[str, Any]:
    from rdpo.evaluation.compare import summarize

    weights = {reward.name: reward.weight for reward in run.job.rewards}
    evaluated = folder.table().sort_by(ID).to_pylist() if folder.parts() else []
    return summarize(evaluated, weights, run.job.seed)


def _evaluate(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    """Answers of both models, their scores and the divergence."""
    import ray.data

    from rdpo.evaluation.generate import START, TRAINED, add_divergence, answer_prompts
    from rdpo.policy.models import local_model
    from rdpo.preference.rewards import score_answers
    from rdpo.training.checkpoint import MERGED

    job = run.job
    start = str(local_model(job.student.model, job.student.revision))
    trained = run.folder("training").local(MERGED)
    answered = answer_prompts(rows.take_all(), job, {START: start, TRAINED: trained})
    scored = score_answers(ray.data.from_arrow(table_of(answered)), job, [START, TRAINED]).materialize()
    return add_divergence(scored, job, trained, TRAINED)


def _publish(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    from rdpo.evaluation.publish import publish

    inputs = {stage.name: run.manifest(stage.name, "model") for stage in stages_of(run.job)[:-1]}
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
    Stage("calibration", (), lineage.calibration, _calibration, unit="known pairs"),
    Stage(
        "synthesis",
        ("prompts",),
        lineage.synthesis,
        rows=RowWork(_training_prompts, _write_answers, _synthesis_summary, generates=True),
    ),
    Stage(
        "rewards",
        ("synthesis",),
        lineage.rewards,
        rows=RowWork(lambda run: stage_source(run, "synthesis"), _score),
        joins=True,
    ),
    Stage("pairs", ("rewards",), lineage.pairs, rows=RowWork(_scored, _make_pairs, _pairs_summary)),
    Stage("replay", ("prompts", "pairs"), lineage.replay, _replay, unit="ready pairs"),
    Stage("reference", ("pairs", "replay"), lineage.reference, rows=RowWork(_pairs_source, _reference)),
    Stage("training", ("reference",), lineage.training, _training, id_column=None, unit="steps"),
    Stage("retention", ("training",), lineage.retention, _retention, unit="texts"),
    Stage(
        "evaluation",
        ("prompts", "training"),
        lineage.evaluation,
        rows=RowWork(
            lambda run: _split_source(run, HELDOUT, run.job.evaluation.limit),
            _evaluate,
            _evaluation_summary,
            generates=True,
        ),
    ),
    Stage("model", ("training", "evaluation"), lineage.publish, _publish, id_column=None, unit="model"),
)


def stages_of(job: Job) -> tuple[Stage, ...]:
    """The stages of a job, in order: all but those that it leaves out."""
    left_out = {name for name, wanted in (("replay", job.replay), ("retention", job.retention)) if wanted is None}
    return tuple(
        replace(stage, inputs=tuple(name for name in stage.inputs if name not in left_out))
        for stage in STAGES
        if stage.name not in left_out
    )
