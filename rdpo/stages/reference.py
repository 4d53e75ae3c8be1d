"""Reference: token ids of the pairs, and their log-probs under the start model."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from rdpo.errors import InputError
from rdpo.execution.stage import Reads, RowWork, Source, Stage
from rdpo.records import HELDOUT, ID_COLUMN, SCORE_COLUMNS
from rdpo.stages.settings import rendering_of_student, student_settings

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

    from rdpo.cluster.pools import Pool
    from rdpo.config import Job
    from rdpo.execution.reader import RunReader
    from rdpo.execution.run import Run
    from rdpo.files.manifest import Settings, Summary
    from rdpo.files.stage_folder import StageFolder


def settings(job: Job) -> Settings:
    """Settings of the reference stage, with the student's weights."""
    found = {**job.reference.model_dump(), "student": student_settings(job), **rendering_of_student(job)}
    weights = job.training.token_weights
    return {**found, "token_weights": weights.model_dump()} if weights else found


def _drawn_pairs(run: RunReader) -> Source:
    """The pairs that are trained on: all generated ones, or those of the mix with ready ones."""
    from rdpo.preference.replay import until

    generated = run.source("pairs")
    if run.job.replay is None:
        return generated

    ready, seed = run.source("replay"), run.job.seed
    mix = run.require("replay", "reference").summary
    if "heldout" not in mix:
        raise InputError("reference: the replay stage was made by an earlier version; `rdpo run` makes it again")
    # Without `last` all generated pairs were drawn; those that are held out are measured in any case.
    last, measured = mix["last"], mix["heldout"]
    count = mix["generated"] + measured

    def rows() -> ray.data.Dataset:
        parts = [generated.rows()] if count else []
        if last is not None and parts:
            parts[0] = parts[0].map_batches(until, fn_kwargs={"last": last, "seed": seed}, batch_format="pyarrow")
        parts += [ready.rows()] if ready.count else []
        # Ray's union is of two and more: with a share of 0 or 1, or where nothing ready is left, there is one.
        return parts[0].union(*parts[1:]) if parts[1:] else parts[0]

    def ids() -> pa.ChunkedArray:
        import pyarrow as pa

        drawn: list[pa.Array] = []
        for part in run.folder("pairs").tables(columns=[ID_COLUMN, HELDOUT]):
            drawn += (part if last is None else until(part, last, seed))[ID_COLUMN].chunks
        return pa.chunked_array([*drawn, *ready.ids().chunks], pa.string())

    return Source(rows, count + ready.count, ids)


def pairs_source(run: RunReader) -> Source:
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
    from rdpo.execution.keys import same_settings
    from rdpo.preference.known_logps import COLUMNS, OPTIONAL, known_logps
    from rdpo.preference.reference import FORWARD, add_reference

    own = settings(run.job)
    made = run.made_by_siblings("reference")
    same = [folder for folder, theirs in made if same_settings(theirs, own) and not doubt(run.job, folder)]
    for folder in same:
        # Where all log-probs are known the model is not even loaded.
        if forward := folder.read_json(FORWARD):
            run.folder("reference").write_json(FORWARD, forward)
    # With weights that go by both answers of a pair a log-prob is not one of an answer alone.
    known = () if run.job.training.token_weights else same
    tables = chain.from_iterable(folder.tables("", COLUMNS, OPTIONAL) for folder in known)
    return add_reference(rows, run.job, known_logps(tables), run.dir)


def doubt(job: Job, folder: StageFolder) -> str:
    """Why log-probs in a folder that does not say how they were read cannot be taken; empty if they can.

    Earlier versions read an architecture in packed rows by its signature, and noted nothing. Where packed rows are
    exact, or impossible, these log-probs are what they would be now.
    """
    from rdpo.modeling.student import check_architecture
    from rdpo.preference.reference import FORWARD

    if folder.read_json(FORWARD) or not folder.count():
        return ""
    try:
        read_as = check_architecture(job)
    except InputError as error:
        return str(error)
    if read_as is None:
        return "an earlier version made it, and whether its packed rows were exact is not known"
    return f"an earlier version read packed rows, which {read_as.why}" if read_as.why else ""


def summarize(run: Run, folder: StageFolder) -> Summary:
    """How the reference was read; says so where packed rows would not have been exact."""
    from rdpo.preference.reference import FORWARD

    forward = folder.read_json(FORWARD)
    if not forward:
        return {}
    if forward["why"]:
        run.console.say(f"{'':<12}log-probs are read in padded rows; packed ones: {forward['why']}")
    return {"forward": forward}


def pools(job: Job) -> list[Pool]:
    """Who reads the pairs."""
    from rdpo.preference.reference import reference_pool

    return [reference_pool(job)]


STAGE = Stage(
    "reference",
    inputs=("pairs", "replay"),
    settings=settings,
    rows=RowWork(pairs_source, refer, summarize, pools=pools),
    reads={"pairs": Reads(without=SCORE_COLUMNS), "replay": Reads(without=SCORE_COLUMNS, summary=True)},
    packages=("rdpo", "torch", "transformers"),
    command="reference",
    doubt=doubt,
)
