"""Scores, preference pairs, their mix with ready ones, and the reference's log-probs."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from rdpo.errors import InputError
from rdpo.execution.run import Run
from rdpo.execution.stage import Source
from rdpo.execution.streaming import stage_source
from rdpo.files.stage_folder import StageFolder, write_rows
from rdpo.records import HELDOUT, ID_COLUMN, digest
from rdpo.stages import settings as lineage
from rdpo.stages.prompts import split_ids
from rdpo.tracking.console import Meter

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

    from rdpo.preference.shaping import Shaping


def score(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    """The scores of all answers that a pair may need."""
    from rdpo.preference.pairs import scored_answers
    from rdpo.preference.rewards import score_answers

    return score_answers(rows, run.job, scored_answers(run.job), run.streams)


def scored(run: Run) -> Source:
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


def pair(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    """The preference pairs of scored rows."""
    from rdpo.preference.pairs import make_pairs

    shaping = _shaping(run)
    return make_pairs(rows, run.job, shaping.length_coef if shaping else 0.0)


def _shaping(run: Run) -> Shaping | None:
    from rdpo.preference.pairs import shaping_of

    return shaping_of(run.folder("rewards").tables(), run.job.pairs)


def pairs_summary(run: Run, folder: StageFolder) -> dict[str, Any]:
    """How far the rewards agree with the teacher, the defects of its turns, and the price of length; says so."""
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
            run.console.warn(f"{reward} gives every answer the same score; it tells nothing here")
    told: dict[str, Any] = {"agreement": {reward: asdict(sides) for reward, sides in agreed.items()}}
    if shaping := _shaping(run):
        told["shaping"] = asdict(shaping)
        gap = f"the best are {shaping.mean_length_gap:+.1f} characters longer than the worst"
        run.console.say(f"{'':<12}a character costs {shaping.length_coef:g}: {gap}")
    return {**told, "defects": found} if run.job.synthesis.task else told


def draw_replay(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    """The ready pairs that are trained on beside the generated ones; all others are dropped with the reason."""
    from rdpo.preference.replay import draw_mix, keyed, offline_pairs, usable, with_reasons

    assert run.job.replay is not None
    folder.clear_parts()
    pairs, heldout = run.folder("pairs"), split_ids(run.folder("prompts"), HELDOUT).to_pylist()
    ready = offline_pairs(run.job, run.job.replay).materialize()
    offline = keyed(ready.map_batches(usable, batch_format="pyarrow").iter_batches(batch_format="pyarrow"))
    generated = keyed(pairs.tables(columns=[ID_COLUMN, "prompt"]))
    mix = draw_mix(generated, offline, frozenset(heldout), run.job.replay.share, run.job.seed)
    schema = pairs.schema() if generated else ready.schema().base_schema
    told = ready.map_batches(with_reasons, fn_kwargs={"reasons": mix.reasons, "schema": schema}, batch_format="pyarrow")
    write_rows(told, folder, ID_COLUMN, lambda block: meter.advance(block.rows + block.dropped))
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


def pairs_source(run: Run) -> Source:
    """The pairs that are trained on.

    Raises:
        InputError: there is none.
    """
    source = _drawn_pairs(run)
    if not source.count:
        raise InputError("pairs: no pair is left to train on; see the dropped reasons of the pairs stage")
    return source


def refer(rows: ray.data.Dataset, run: Run) -> ray.data.Dataset:
    """Token ids and the reference's log-probs of pairs; those that a sibling has made are taken from there."""
    from rdpo.preference.known_logps import COLUMNS, known_logps
    from rdpo.preference.reference import add_reference

    own = digest(lineage.reference(run.job))
    same = (folder for folder, settings in run.made_by_siblings("reference") if digest(settings) == own)
    known = known_logps(table for folder in same for table in folder.tables(columns=COLUMNS))
    return add_reference(rows, run.job, known)
