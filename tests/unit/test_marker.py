"""Only a run's directory is written to, and only what rdpo made in it is removed."""

import json

import pytest

from rdpo.config import Job, load_job, to_toml
from rdpo.errors import InputError
from rdpo.execution.pipeline import locked
from rdpo.execution.reader import JOB_FILE, MARKER, RUN_FORMAT, RunReader
from rdpo.files.folder import MANIFEST


@pytest.fixture
def job(job_table):
    return Job.model_validate(job_table)


@pytest.fixture
def run_dir(tmp_path):
    place = tmp_path / "thesis"
    place.mkdir()
    return place


def names(run_dir):
    return sorted(path.name for path in run_dir.iterdir() if path.name != ".lock")


@pytest.mark.parametrize("fresh", [False, True])
def test_a_directory_with_other_things_is_refused_and_left_as_it_is(job, run_dir, fresh):
    (run_dir / "thesis.txt").write_text("years")
    with (
        pytest.raises(InputError, match=r"holds thesis\.txt and no run of rdpo's; choose another --run-dir"),
        locked(job, str(run_dir), fresh),
    ):
        pass
    assert names(run_dir) == ["thesis.txt"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_job_file_of_another_program_is_neither_overwritten_nor_removed(job, run_dir, fresh):
    (run_dir / JOB_FILE).write_text("[server]\nport = 80\n")
    with (
        pytest.raises(InputError, match="is no job of rdpo's, and is left as it is"),
        locked(job, str(run_dir), fresh),
    ):
        pass
    assert (run_dir / JOB_FILE).read_text() == "[server]\nport = 80\n"


def test_a_run_from_before_there_were_markers_is_taken_and_marked(job, run_dir):
    (run_dir / JOB_FILE).write_text(to_toml(job))
    (run_dir / "prompts").mkdir()
    with locked(job, str(run_dir)):
        assert names(run_dir) == [JOB_FILE, "prompts", MARKER]
    assert json.loads((run_dir / MARKER).read_text())["format"] == RUN_FORMAT


def test_starting_over_removes_what_rdpo_made_and_nothing_else(job, run_dir):
    with locked(job, str(run_dir)):
        pass
    for stage in ("prompts", "synthesis"):
        (run_dir / stage).mkdir()
    (run_dir / "prompts" / MANIFEST).write_text("{}")
    (run_dir / "synthesis" / "in_progress.json").write_text("{}")
    (run_dir / "report.html").write_text("page")
    (run_dir / "notes").mkdir()
    (run_dir / "notes" / "mine.txt").write_text("years")
    said = []
    with locked(job, str(run_dir), fresh=True, say=said.append):
        assert names(run_dir) == [JOB_FILE, "notes", MARKER]
    assert (run_dir / "notes" / "mine.txt").read_text() == "years"
    assert said == [f"{run_dir}/notes is not rdpo's and stays"]
    assert load_job(run_dir / JOB_FILE) == job


def test_a_run_whose_start_over_was_interrupted_is_still_one(job, run_dir, monkeypatch):
    with locked(job, str(run_dir)):
        pass
    (run_dir / "notes.txt").write_text("mine")
    monkeypatch.setattr("rdpo.execution.pipeline.to_toml", lambda job: 1 / 0)
    with pytest.raises(ZeroDivisionError), locked(job, str(run_dir), fresh=True):
        pass
    assert names(run_dir) == ["notes.txt", MARKER]
    monkeypatch.undo()
    with locked(job, str(run_dir)):
        assert names(run_dir) == [JOB_FILE, "notes.txt", MARKER]


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ('{"format": 99, "rdpo": "9.1"}', "written by rdpo 9.1 in format 99, and this version reads up to 1"),
        ("[]", "does not say the run's format"),
        ("not json", "does not say the run's format"),
    ],
)
def test_a_run_of_a_newer_version_is_neither_read_nor_written(job, run_dir, marker, said):
    (run_dir / MARKER).write_text(marker)
    (run_dir / JOB_FILE).write_text("of = 'the future'")
    for attempt in (lambda: RunReader(str(run_dir)), lambda: locked(job, str(run_dir)).__enter__()):
        with pytest.raises(InputError, match=said):
            attempt()
    assert (run_dir / JOB_FILE).read_text() == "of = 'the future'"
