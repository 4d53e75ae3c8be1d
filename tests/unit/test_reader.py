"""A run seen from its files: what is finished, what is asked for too early, and folders of earlier versions."""

import pytest

from rdpo.errors import InputError
from rdpo.execution.reader import RunReader
from rdpo.files.folder import IN_PROGRESS
from tests.support.made_up import made_up_run


@pytest.fixture
def run(tmp_path, job_table):
    return RunReader(made_up_run(tmp_path / "run", job_table))


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no run here \(no config.toml\)"):
        RunReader(str(tmp_path))


def test_finished_stages_are_found_in_the_order_that_is_asked(run):
    assert list(run.finished(["evaluation", "replay", "pairs"])) == ["evaluation", "pairs"]
    assert run.manifest("replay") is None
    assert run.require("pairs").stage == "pairs"


def test_an_unfinished_stage_is_named_with_the_remedy(run):
    with pytest.raises(InputError, match="the replay stage is not finished; `rdpo run` makes it"):
        run.require("replay")
    with pytest.raises(InputError, match="reference needs the replay stage, which is not finished"):
        run.require("replay", "reference")


def test_rows_come_in_the_order_of_their_ids(run):
    ids = run.table("pairs")["prompt_id"].to_pylist()
    assert ids == sorted(ids) and len(ids) == run.source("pairs").count
    assert run.table("pairs", dropped=True)["dropped"].to_pylist() == ["reward gap is below pairs.min_gap"]


def test_a_folder_that_an_earlier_version_began_keeps_its_attempt(run):
    folder = run.folder("replay")
    folder.write_json(IN_PROGRESS, {"key": "k", "birth": "b", "began": 0.0})
    folder.begin("k")
    assert folder.attempt_id == "b"
    folder.begin("another")
    assert folder.attempt_id not in ("", "b")
