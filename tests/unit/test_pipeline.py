"""When a run is prepared: once, and only where something is made."""

import io

import pyarrow as pa
import pytest

from rdpo.config import Job
from rdpo.execution.pipeline import run_stages
from rdpo.execution.run import Run
from rdpo.execution.stage import Stage
from rdpo.tracking.console import Console


def execute(run, folder, meter):
    folder.clear_parts()
    folder.write_parts(pa.table({"prompt_id": ["a"]}), "prompt_id")
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
    assert prepared(seed=1) == (1, ["prompts", "synthesis"])
