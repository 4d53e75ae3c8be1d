"""Stages that run at the same time: rows flow on as they are stored, and nothing is made twice after a stop."""

import io
import json
import time

import pyarrow as pa
import pytest

from rdpo.config import Job
from rdpo.errors import EndpointDown, InputError
from rdpo.execution.pipeline import run_stages
from rdpo.execution.run import Run
from rdpo.execution.stage import RowWork, Source, Stage
from rdpo.files.stage_folder import StageFolder
from rdpo.files.unfinished import NOTE, unfinished
from rdpo.records import drop, table_of
from rdpo.tracking.console import Console

pytestmark = pytest.mark.ray

JOB = {"name": "flow", "student": {"model": "none"}, "prompts": {"source": "none.jsonl"}}
ROWS = 40
IDS = [f"{index:02d}" for index in range(ROWS)]


class Stop(RuntimeError):
    """What ends a run in the middle."""


def source(run):
    import ray.data

    rows = [{"prompt_id": name, "dropped": None} for name in IDS]
    return Source(lambda: ray.data.from_items(rows, override_num_blocks=8), len(IDS), lambda: pa.chunked_array([IDS]))


def worker(name, diary, pause=0.0, drops=(), stop_at=None, ends_by=None):
    """Work of a stage that notes each row it makes, drops some, and may break down at one.

    With `ends_by` it finishes no row whose number is odd, as after an account has ended.
    """

    def make_block(block: pa.Table) -> pa.Table:
        rows = block.to_pylist()
        for index, row in enumerate(rows):
            if row.get("dropped"):
                continue
            if row["prompt_id"] == stop_at and diary.joinpath("stop").exists():
                raise Stop(stop_at)
            if ends_by and int(row["prompt_id"]) % 2:
                rows[index] = unfinished({**row, name: 0}, ends_by)
                continue
            time.sleep(pause)
            with open(diary / f"{name}-{row['prompt_id']}", "a") as entry:
                entry.write(json.dumps(time.time()) + "\n")
            rows[index] = {**row, name: 1}
            if row["prompt_id"] in drops:
                rows[index] = drop(rows[index], "unwanted")
        return table_of(rows)

    def make(rows, run):
        # The cut keeps the steps of a chain apart, as a pool of actors would.
        return rows.repartition(target_num_rows_per_block=2).map_batches(
            make_block, batch_format="pyarrow", batch_size=None, num_cpus=1
        )

    return make


def stages(first, second):
    return [
        Stage("synthesis", (), lambda job: {}, rows=RowWork(source, first, has_failed=bool)),
        Stage(
            "rewards",
            ("synthesis",),
            lambda job: {},
            rows=RowWork(lambda run: run.source("synthesis"), second, has_failed=bool),
            joins=True,
        ),
    ]


def run_together(folder, first, second, together=True):
    run = Run(Job.model_validate(JOB), str(folder), Console(io.StringIO()), lambda *_: together)
    run_stages(run, stages(first, second))
    return run


def made(diary, name):
    """How often, and when for the first time, a stage made each row."""
    entries = {path.name.split("-")[1]: path.read_text().splitlines() for path in diary.glob(f"{name}-*")}
    return {row: (len(lines), json.loads(lines[0])) for row, lines in entries.items()}


@pytest.fixture
def diary(tmp_path):
    (tmp_path / "diary").mkdir()
    return tmp_path / "diary"


def test_the_second_stage_begins_before_the_first_has_ended(ray_cluster, tmp_path, diary):
    run = run_together(tmp_path, worker("a", diary, pause=0.05), worker("b", diary))
    first, second = made(diary, "a"), made(diary, "b")
    assert min(when for _, when in second.values()) < max(when for _, when in first.values())
    assert run.manifests["rewards"].together == ["synthesis"]
    assert StageFolder(str(tmp_path), "rewards").table().sort_by("prompt_id")["prompt_id"].to_pylist() == IDS


def test_one_after_the_other_gives_the_same_folders(ray_cluster, tmp_path, diary):
    drops = IDS[3:9]
    together = run_together(tmp_path / "x", worker("a", diary, drops=drops), worker("b", diary))
    apart = run_together(tmp_path / "y", worker("a", diary, drops=drops), worker("b", diary), together=False)
    for stage in ("synthesis", "rewards"):
        one, other = together.manifests[stage], apart.manifests[stage]
        assert (one.rows_in, one.rows_out, one.dropped) == (other.rows_in, other.rows_out, other.dropped)
    assert together.manifests["rewards"].rows_in == ROWS - len(drops)
    assert set(made(diary, "b")) == set(IDS) - set(drops)


def test_what_a_stopped_run_has_stored_is_not_made_again(ray_cluster, tmp_path, diary):
    names = {"synthesis": "a", "rewards": "b"}
    (diary / "stop").touch()
    with pytest.raises(Exception, match="Stop"):
        run_together(tmp_path, worker("a", diary, pause=0.02), worker("b", diary, stop_at=IDS[20]))
    stored = {name: set(StageFolder(str(tmp_path), name).done_ids("prompt_id").to_pylist()) for name in names}
    assert 0 < len(stored["rewards"]) < ROWS
    (diary / "stop").unlink()
    run_together(tmp_path, worker("a", diary), worker("b", diary))
    for stage, name in names.items():
        counts = made(diary, name)
        assert set(counts) == set(IDS)
        assert all(counts[row][0] == 1 for row in stored[stage])
        assert sorted(StageFolder(str(tmp_path), stage).table()["prompt_id"].to_pylist()) == IDS


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("error", [InputError("the quota is used up"), EndpointDown("nothing answers")])
def test_finished_rows_are_stored_before_what_ended_the_others_ends_the_run(
    ray_cluster, tmp_path, diary, error, together
):
    with pytest.raises(type(error), match=str(error)):
        run_together(tmp_path, worker("a", diary, ends_by=error), worker("b", diary), together)
    folders = {"a": StageFolder(str(tmp_path), "synthesis"), "b": StageFolder(str(tmp_path), "rewards")}
    assert sorted(folders["a"].done_ids("prompt_id").to_pylist()) == IDS[::2]
    assert "unfinished" not in folders["a"].schema().names
    assert set(made(diary, "b")) == (set(IDS[::2]) if together else set())
    assert not any(folder.exists("manifest.json") for folder in folders.values())

    run = run_together(tmp_path, worker("a", diary), worker("b", diary), together)
    assert run.manifests["synthesis"].rows_out == run.manifests["rewards"].rows_out == ROWS
    assert {count for name in "ab" for count, _ in made(diary, name).values()} == {1}
    assert not any(NOTE in name for manifest in run.manifests.values() for name in manifest.files)


@pytest.mark.parametrize("failing", ["a", "b"])
def test_a_stage_that_keeps_no_row_is_not_committed_and_is_done_once_the_cause_is_gone(
    ray_cluster, tmp_path, diary, failing
):
    broken = {name: worker(name, diary, drops=IDS if name == failing else ()) for name in "ab"}
    stage = {"a": "synthesis", "b": "rewards"}[failing]
    with pytest.raises(InputError, match=rf"{stage}: no row of 40 is left; 40 times: unwanted, for example row \d\d;"):
        run_together(tmp_path, broken["a"], broken["b"])
    assert (StageFolder(str(tmp_path), "synthesis").manifest() is None) == (failing == "a")
    assert StageFolder(str(tmp_path), "rewards").manifest() is None
    run = run_together(tmp_path, worker("a", diary), worker("b", diary))
    assert run.manifests["rewards"].rows_out == ROWS
    assert {count for count, _ in made(diary, "a").values()} == ({2} if failing == "a" else {1})


def run_in_steps(folder, makes, together=True):
    steps = RowWork(source, steps=lambda run: makes, has_failed=bool)
    run = Run(Job.model_validate(JOB), str(folder), Console(io.StringIO()), lambda *_: together)
    run_stages(run, [Stage("synthesis", (), lambda job: {}, rows=steps)])
    return run


@pytest.mark.parametrize("together", [True, False])
def test_steps_of_a_stage_pass_on_dropped_rows_and_leave_nothing_behind(ray_cluster, tmp_path, diary, together):
    makes = [worker("a", diary, drops=IDS[3:9]), worker("b", diary), worker("c", diary)]
    run = run_in_steps(tmp_path, makes, together)
    manifest = run.manifests["synthesis"]
    assert (manifest.rows_in, manifest.rows_out, manifest.dropped) == (ROWS, ROWS - 6, {"unwanted": 6})
    folder = StageFolder(str(tmp_path), "synthesis")
    assert set(folder.table().column_names) >= {"a", "b", "c"}
    assert not any(name.startswith("step-") for name in folder.files())
    assert set(made(diary, "c")) == set(IDS) - set(IDS[3:9])


@pytest.mark.parametrize("together", [True, False])
def test_what_a_step_of_a_stopped_run_has_made_is_not_made_again(ray_cluster, tmp_path, diary, together):
    (diary / "stop").touch()
    with pytest.raises(Exception, match="Stop"):
        run_in_steps(tmp_path, [worker("a", diary, pause=0.02), worker("b", diary, stop_at=IDS[20])], together)
    folder = StageFolder(str(tmp_path), "synthesis")
    kept = set(StageFolder(folder.path, "step-1").done_ids("prompt_id").to_pylist())
    done = set(folder.done_ids("prompt_id").to_pylist())
    assert kept and done <= kept
    assert together or kept == set(IDS)
    (diary / "stop").unlink()

    run = run_in_steps(tmp_path, [worker("a", diary), worker("b", diary)], together)
    assert run.manifests["synthesis"].rows_out == ROWS
    assert all(count == 1 for row, (count, _) in made(diary, "a").items() if row in kept)
    assert all(count == 1 for row, (count, _) in made(diary, "b").items() if row in done)


def test_a_damaged_part_is_made_again_from_its_first_step_and_nothing_else_is(ray_cluster, tmp_path, diary):
    makes = [worker("a", diary), worker("b", diary)]
    run_in_steps(tmp_path, makes)
    folder = StageFolder(str(tmp_path), "synthesis")
    part = folder.parts()[0]
    lost = set(folder.part(part)["prompt_id"].to_pylist())
    folder.reopen([part])
    run = run_in_steps(tmp_path, makes)
    assert run.manifests["synthesis"].rows_out == ROWS
    for name in "ab":
        assert {row for row, (count, _) in made(diary, name).items() if count == 2} == lost


@pytest.mark.parametrize("together", [True, False])
def test_rows_that_a_step_cannot_finish_stay_to_be_done(ray_cluster, tmp_path, diary, together):
    error = InputError("the quota is used up")
    with pytest.raises(InputError, match="the quota is used up"):
        run_in_steps(tmp_path, [worker("a", diary, ends_by=error), worker("b", diary)], together)
    assert set(made(diary, "b")) == (set(IDS[::2]) if together else set())
    run = run_in_steps(tmp_path, [worker("a", diary), worker("b", diary)], together)
    assert run.manifests["synthesis"].rows_out == ROWS
    assert {count for name in "ab" for count, _ in made(diary, name).values()} == {1}
