"""Stages that run at the same time: rows flow on as they are stored, and nothing is made twice after a stop."""

import io
import json
import time

import pyarrow as pa
import pytest

from rdpo.config import Job
from rdpo.execution.pipeline import run_stages
from rdpo.execution.run import Run
from rdpo.execution.stage import RowWork, Source, Stage
from rdpo.files.stage_folder import StageFolder
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


def worker(name, diary, pause=0.0, drops=(), stop_at=None):
    """Work of a stage that notes each row it makes, drops some, and may break down at one."""

    def make_block(block: pa.Table) -> pa.Table:
        rows = block.to_pylist()
        for index, row in enumerate(rows):
            if row["prompt_id"] == stop_at and diary.joinpath("stop").exists():
                raise Stop(stop_at)
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
        Stage("synthesis", (), lambda job: {}, rows=RowWork(source, first)),
        Stage(
            "rewards",
            ("synthesis",),
            lambda job: {},
            rows=RowWork(lambda run: run.source("synthesis"), second),
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
