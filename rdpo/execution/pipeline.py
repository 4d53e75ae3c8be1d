"""Running stages: each is made again exactly when something it depends on has changed.

A stage's key is a hash of its own settings, of the fingerprints of models and files it reads, and of what it reads of
its inputs. A committed folder with that key is skipped; an unfinished one is continued if it was begun with the same
settings on the same making of its inputs (`rdpo.execution.resume`); anything else is made anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from rdpo.cluster.installed import versions
from rdpo.config import Job, to_toml
from rdpo.errors import InputError
from rdpo.execution import resume
from rdpo.execution.keys import former_key, stage_key
from rdpo.execution.lock import Check, Say, held
from rdpo.execution.marker import take_directory
from rdpo.execution.reader import JOB_FILE
from rdpo.execution.run import Run
from rdpo.execution.stage import Stage
from rdpo.execution.streaming import chain_of, steps_kept, stream_rows
from rdpo.files.duplicates import remove_duplicates
from rdpo.files.folder import Folder
from rdpo.files.manifest import Manifest, Settings, Summary
from rdpo.files.parts import TOKENS
from rdpo.files.stage_folder import StageFolder
from rdpo.records import text_of
from rdpo.tracking.console import Meter
from rdpo.tracking.listeners import listening
from rdpo.tracking.trace import span

REASONS_SHOWN = 20
EXAMPLE_CHARS = 80


def run_stages(run: Run, stages: Sequence[Stage]) -> None:
    """Bring stages up to date, in order; those that can, at the same time."""
    run.console.events.run = run.job.name
    with listening(run.job, run.dir, run.console):
        _in_order(run, stages)


def _in_order(run: Run, stages: Sequence[Stage]) -> None:
    waiting = list(stages)
    while waiting:
        chain = [waiting.pop(0)]
        if _up_to_date(run, chain[0]):
            continue
        if repair := _reopened(run, chain[0], stages):
            # The inputs once more, then this stage from the top.
            waiting = [*repair, *chain, *waiting]
            continue
        if not run.prepared:
            resume.check(run, chain[0], chain[0].settings(run.job))
            _prepare(run)
        # Stages that may take up rows while these are made go along.
        while run.streams and waiting and waiting[0].joins:
            chain.append(waiting.pop(0))
        _make(run, chain)
        if run.on_stage and waiting:
            with span("report so far"):
                run.on_stage(run)


def _prepare(run: Run) -> None:
    """Try the job's models and start Ray, once, before anything is made."""
    for section in run.job.trusted_code:
        run.console.warn(f"{section}.trust_remote_code: Python code that ships with the model is run")
    with span("models tried"):
        run.streams = run.prepare(run.job, run.console.say)
    run.prepared = True


def _up_to_date(run: Run, stage: Stage) -> bool:
    """Whether a stage is committed with its present key, here or in a sibling; says so.

    Raises:
        InputError: an input is missing.
    """
    own, settings = run.folder(stage.name), stage.settings(run.job)
    inputs = {name: run.require(name, stage.name) for name in stage.inputs}
    for folder in (own, *(StageFolder(sibling, stage.name) for sibling in run.siblings)):
        manifest = folder.manifest()
        if manifest and is_up_to_date(manifest, stage, settings, inputs):
            if doubt := stage.doubt(run.job, folder):
                if folder is own:
                    run.console.say(f"{stage.name:<12}made again: {doubt}")
                continue
            if folder is not own and not _taken(run, own, folder):
                continue
            run.manifests[stage.name] = manifest
            where = "up to date" if folder is own else f"as in {Path(folder.path).parent.name}"
            run.console.say(f"{stage.name:<12}{where}")
            run.console.tell("stage_end", stage=stage.name, state=where, **_counts(manifest))
            return True
    return False


def is_up_to_date(manifest: Manifest, stage: Stage, settings: Settings, inputs: Mapping[str, Manifest]) -> bool:
    """Whether a committed stage is what these settings and inputs would make."""
    if manifest.columns is None:
        # Earlier versions knew an input by the digest of its key and files, and some stages had fewer inputs.
        digests = {name: inputs[name].digest for name in manifest.inputs if name in inputs}
        return manifest.key == former_key(stage.name, settings, digests)
    return manifest.key == stage_key(stage.name, settings, _read(stage, inputs))


def _read(stage: Stage, inputs: Mapping[str, Manifest]) -> dict[str, str]:
    return {name: stage.read_of(name, made) for name, made in inputs.items()}


def _taken(run: Run, own: StageFolder, folder: StageFolder) -> bool:
    """Whether a sibling's stage was taken over: not if its own driver has begun it again meanwhile."""
    run.check()
    return own.take_over(folder)


def _reopened(run: Run, stage: Stage, stages: Sequence[Stage]) -> list[Stage]:
    """Those inputs of a stage whose files are not as they were written; they are unfinished again.

    What this run has itself made is not read once more.

    Raises:
        InputError: one of them is not to be run.
    """
    repair = []
    for name in stage.inputs:
        folder = run.folder(name)
        damaged = [] if name in run.made else folder.damaged()
        if not damaged:
            continue

        what = damaged[0] + (f" and {len(damaged) - 1} other files" if damaged[1:] else "")
        maker = next((other for other in stages if other.name == name), None)
        if maker is None:
            raise InputError(f"{folder.path}/{what}: not as it was written; `rdpo run` makes it again")
        run.console.warn(f"{name} is not as it was written, made again: {what}")
        run.check()
        folder.reopen(damaged)
        run.manifests.pop(name, None)
        repair.append(maker)
    return repair


def _begun(run: Run, stage: Stage, settings: Settings) -> Manifest:
    """The manifest of a stage that has its inputs but no rows yet."""
    inputs = _read(stage, {name: run.require(name, stage.name) for name in stage.inputs})
    return Manifest(stage.name, stage_key(stage.name, settings, inputs), settings, inputs)


def _make(run: Run, chain: Sequence[Stage]) -> None:
    """Make stages, together if they are several, and commit them in order."""
    began = time.monotonic()
    folders = [run.folder(stage.name) for stage in chain]
    # As they are now: what is edited while a stage is made is not what made it.
    settings = [stage.settings(run.job) for stage in chain]
    for stage, own in zip(chain, settings, strict=True):
        run.check()
        resume.begin(run, stage, own)
        run.console.tell("stage_begin", stage=stage.name)
    name = "+".join(stage.name for stage in chain)
    with span(name), run.console.stage(name, None, chain[0].unit) as meter:
        summary = _work(run, chain, folders, meter)

    for stage, folder, own in zip(chain, folders, settings, strict=True):
        manifest = _begun(run, stage, own)
        manifest.summary, manifest.tokens = summary, meter.tokens
        manifest.seconds = round(time.monotonic() - began, 1)
        manifest.together = [other.name for other in chain if other is not stage]
        with span(f"{stage.name} committed"):
            _commit(run, stage, folder, manifest)


def _work(run: Run, chain: Sequence[Stage], folders: Sequence[StageFolder], meter: Meter) -> Summary:
    if chain[0].execute:
        return chain[0].execute(run, folders[0], meter)
    links = chain_of(run, [(stage.rows, folder) for stage, folder in zip(chain, folders, strict=True) if stage.rows])
    if run.streams:
        stream_rows(run, list(links), meter)
        return {}
    for link in links:
        stream_rows(run, [link], meter)
    meter.label = ""
    return {}


def _commit(run: Run, stage: Stage, folder: StageFolder, manifest: Manifest) -> None:
    if stage.rows:
        _check_kept(run, stage, folder)
        for step in steps_kept(folder):
            step.clear()
        if stage.id_column and (removed := remove_duplicates(folder, stage.id_column)):
            run.console.warn(f"{stage.name}: {removed} rows were stored twice, by tasks done again; one of each stays")
        manifest.summary = {"rows_in": stage.rows.source(run).count, **stage.rows.summarize(run, folder)}
        manifest.tokens = folder.total(TOKENS) if stage.rows.generates else 0
    expected = manifest.summary.pop("rows_in", None)
    manifest.seed, manifest.versions, manifest.job = run.job.seed, versions(), to_toml(run.job)
    run.manifests[stage.name] = folder.commit(manifest, stage.id_column, expected, run.check)
    run.made.add(stage.name)
    run.console.made(manifest)
    run.console.tell("stage_end", stage=stage.name, state="made", **_counts(manifest))

    first = _log_dropped(run, folder, stage.id_column) if stage.id_column else {}
    reasons = sorted(manifest.dropped.items(), key=lambda item: -item[1])
    for reason, count in reasons[:REASONS_SHOWN]:
        run.console.say(f"{'':<12}dropped {count}: {reason}{_place(first.get(reason, ''), count)}")
    if others := reasons[REASONS_SHOWN:]:
        run.console.say(f"{'':<12}dropped {sum(count for _, count in others)}: {len(others)} other reasons")


def _check_kept(run: Run, stage: Stage, folder: StageFolder) -> None:
    """Look whether a stage that dropped all rows has failed as a whole; its rows stay to be done then.

    Raises:
        InputError: it has.
    """
    reasons = {} if folder.count() else folder.reasons()
    if not (stage.rows and stage.id_column and reasons and stage.rows.has_failed(reasons)):
        return
    _log_dropped(run, folder, stage.id_column)
    reason, count = max(reasons.items(), key=lambda item: item[1])
    example = _example(folder, stage.id_column, reason)
    run.check()
    folder.clear_parts()
    raise InputError(
        f"{stage.name}: no row of {sum(reasons.values())} is left; {count} times: {reason}, for example {example}; all "
        "stay to be done: correct what refuses or fails, and the same command does them"
    )


def _example(folder: StageFolder, id_column: str, reason: str) -> str:
    """A row that was dropped for this reason, by its id and the beginning of its prompt."""
    for part in folder.tables("dropped"):
        for row in part.filter(pc.equal(part["dropped"], reason)).slice(0, 1).to_pylist():
            asked = f" ({text_of(row['prompt'])[:EXAMPLE_CHARS]!r})" if row.get("prompt") else ""
            return f"row {row[id_column]}{asked}"
    raise ValueError(f"no row was dropped for: {reason}")


def _log_dropped(run: Run, folder: StageFolder, id_column: str) -> dict[str, str]:
    """Write every dropped row into the log of events; returned is the first row of each reason."""
    first: dict[str, str] = {}
    for table in folder.tables("dropped", [id_column, "dropped"]):
        rows = list(zip(table[id_column].to_pylist(), table["dropped"].to_pylist(), strict=True))
        facts = ({"stage": folder.name, "row": row, "reason": reason} for row, reason in rows)
        run.console.events.write(*(("dropped", fact) for fact in facts))
        for row, reason in rows:
            first.setdefault(reason, row)
    return first


def _place(row: str, count: int) -> str:
    """Where a dropped row stands in the user's file, in words; nothing for rows that only have an id of ours."""
    if ":" not in row:
        return ""
    return f" ({'the first is ' if count > 1 else ''}{row})"


def _counts(manifest: Manifest) -> dict[str, Any]:
    """What a stage did, in figures."""
    names = ("rows_in", "rows_out", "dropped", "tokens", "seconds")
    return {name: getattr(manifest, name) for name in names}


def planned(job: Job, run_dir: str, stages: Sequence[Stage]) -> dict[str, str]:
    """What `run_stages` would do with each stage: nothing, resume it, or make it.

    A stage whose input would be made again counts as made again too: whether the input comes out as it was, so that the
    stage stays, is only known then.
    """
    plan: dict[str, str] = {}
    current: dict[str, Manifest] = {}
    for stage in stages:
        folder = StageFolder(run_dir, stage.name)
        manifest = folder.manifest()
        inputs = {name: current[name] for name in stage.inputs if name in current}
        whole = len(inputs) == len(stage.inputs)
        known = manifest and whole and is_up_to_date(manifest, stage, stage.settings(job), inputs)
        if manifest and known and not stage.doubt(job, folder):
            plan[stage.name], current[stage.name] = "up to date", manifest
        else:
            plan[stage.name] = "would run" if manifest is None else "would run again"
    return plan


@contextmanager
def locked(job: Job, run_dir: str, fresh: bool = False, say: Say = print) -> Iterator[Check]:
    """Hold a run directory: one driver at a time; with `fresh`, what a run made in it is removed. Writes the job.

    What it yields asks whether the run is still this driver's (`lock.held`).

    Raises:
        InputError: it cannot be written, another driver holds it, or it holds something else than a run.
    """
    with held(run_dir, say) as check:
        folder = Folder(run_dir)
        take_directory(folder, fresh, say)
        folder.write_bytes(JOB_FILE, to_toml(job).encode())
        yield check
