"""When a run is prepared: once, and only where something is made."""

import io

import pyarrow as pa
import pytest

from rdpo.config import Job
from rdpo.execution import resume
from rdpo.execution.pipeline import run_stages
from rdpo.execution.reader import RunReader
from rdpo.execution.run import Run
from rdpo.execution.stage import Stage
from rdpo.tracking.console import Console


def execute(run, folder, meter):
    folder.clear_parts()
    folder.write_parts(pa.table({"prompt_id": ["a"], "seed": [run.job.seed // 10]}), "prompt_id")
    return {"rows_in": 1}


STAGES = [
    Stage("prompts", (), lambda job: {"seed": job.seed}, execute),
    Stage("synthesis", ("prompts",), lambda job: {}, execute),
]


@pytest.fixture
def prepared(job_table, tmp_path):
    """Runs the stages, with changes of the job; how often the run was prepared."""

    def of(**changes):
        calls = []
        job = Job.model_validate({**job_table, **changes})
        run = Run(job, str(tmp_path / "run"), Console(io.StringIO()), lambda *_: bool(calls.append(1)))
        run_stages(run, STAGES)
        return len(calls), sorted(run.made)

    return of


def test_a_run_is_prepared_once_and_only_where_something_is_made(prepared):
    assert prepared() == (1, ["prompts", "synthesis"])
    assert prepared() == (0, [])
    assert prepared(seed=10) == (1, ["prompts", "synthesis"])


def test_a_stage_is_read_by_the_job_that_made_it_or_makes_it(prepared, job_table, tmp_path):
    prepared(seed=3)
    later = Job.model_validate({**job_table, "seed": 4})
    run = Run(later, str(tmp_path / "run"), Console(io.StringIO()), lambda *_: False)
    resume.begin(run, STAGES[1], {})
    reader = RunReader(run.dir, Job.model_validate({**job_table, "seed": 5}))
    assert [reader.job_of(stage).seed for stage in ("prompts", "synthesis", "pairs")] == [3, 4, 5]
    assert reader.job_of("prompts") == Job.model_validate({**job_table, "seed": 3})


def test_what_follows_stays_where_its_input_comes_out_as_it_was(prepared):
    assert prepared() == (1, ["prompts", "synthesis"])
    assert prepared(seed=1) == (1, ["prompts"])
    assert prepared(seed=1) == (0, [])
