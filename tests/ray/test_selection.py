"""Rows chosen before the rewards, on a real engine: what is scored, what is not, and what is made again."""

import io

import pytest

from rdpo.config import Job
from rdpo.execution.pipeline import run_stages
from rdpo.execution.run import Run
from rdpo.preference.selection import CERTAINTY, ENTROPY, SURE, UNDECIDED
from rdpo.stages.table import stages_of
from rdpo.tracking.console import Console
from tests.support.jobs import valid_job

pytestmark = [pytest.mark.ray, pytest.mark.long]

NAMES = ("prompts", "synthesis", "screening", "selection", "rewards", "pairs")


def run_of(table, place, streams):
    said = io.StringIO()
    job = Job.model_validate(table)
    run = Run(job, str(place / "run"), Console(said), lambda *_: streams)
    run_stages(run, [stage for stage in stages_of(job) if stage.name in NAMES])
    return run, said.getvalue()


@pytest.mark.parametrize("streams", [False, True])
def test_only_the_rows_that_are_chosen_are_scored(ray_cluster, wordy_models, tmp_path, streams):
    table = valid_job(wordy_models[0], tmp_path)
    table["synthesis"] |= {"task": "best_of", "sampling": {"max_tokens": 6, "temperature": 1.0}}
    table["synthesis"]["engine"] |= {"max_model_len": 256, "options": {"dtype": "float32"}}
    table["pairs"] = {"chosen": "best", "rejected": "worst"}
    table["selection"] = {"prompts": 6, "pairs": 3, "reference": wordy_models[1]}
    run, _ = run_of(table, tmp_path, streams)

    screened = run.folder("screening").table().to_pylist()
    # A random model may say nothing, and that row has no answers to choose by.
    spoken = run.folder("synthesis").count()
    assert len(screened) == spoken >= 8
    assert all(row[CERTAINTY] > 0 for row in screened)
    first = sorted(screened, key=lambda row: -row[ENTROPY])[:6]
    expected = {row["prompt_id"] for row in sorted(first, key=lambda row: -row[CERTAINTY])[:3]}
    scored = run.folder("rewards").table().to_pylist()
    assert {row["prompt_id"] for row in scored} == expected
    assert all(row["response_1_scores"] for row in scored)
    assert run.folder("selection").reasons() == {SURE: spoken - 6, UNDECIDED: 3}
    assert run.manifests["selection"].rows_in == spoken

    table["selection"] |= {"pairs": 4}
    again, said = run_of(table, tmp_path, streams)
    assert again.folder("rewards").count() == 4
    assert "screening   up to date" in said
