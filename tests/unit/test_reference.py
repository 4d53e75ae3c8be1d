"""The reference is read as it was found exact, says so in its folder, and training takes it up from there."""

import io
from dataclasses import replace

import pyarrow as pa
import pytest

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.execution import resume
from rdpo.execution.keys import stage_key
from rdpo.execution.pipeline import planned
from rdpo.execution.run import Run
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder
from rdpo.preference import reference as reference_room
from rdpo.preference.reference import FORWARD, Reference, as_referred
from rdpo.stages import reference
from rdpo.tracking.console import Console
from tests.support.architectures import SMALL, small_model
from tests.support.jobs import valid_job
from tests.support.models import byte_tokenizer, save_model

PAIR = {
    "prompt": [{"role": "user", "content": "why?"}],
    "chosen": [{"role": "assistant", "content": "because"}],
    "rejected": [{"role": "assistant", "content": "no"}],
    "chosen_finished": True,
    "rejected_finished": True,
}


@pytest.fixture
def masked(tmp_path, monkeypatch):
    """A job whose student's window is known to its mask alone, so that packed rows would see beyond it."""
    tokenizer = byte_tokenizer()
    monkeypatch.setitem(SMALL, "vocab_size", len(tokenizer))
    folder = save_model(tmp_path / "masked", small_model("phimoe"), tokenizer)
    table = valid_job(folder, tmp_path)
    table["reference"]["max_length"] = 64
    return table


def run_of(job, place, stream=None):
    return Run(job, str(place), Console(stream or io.StringIO()), lambda *_: False)


def test_a_fallback_is_noted_said_and_trained_on(masked, tmp_path):
    job = Job.model_validate(masked)
    rows = Reference(job, run_dir=str(tmp_path / "run"))(pa.Table.from_pylist([PAIR])).to_pylist()
    assert rows[0]["dropped"] is None
    run = run_of(job, tmp_path / "run", stream := io.StringIO())
    summary = reference.summarize(run, run.folder("reference"))
    assert summary["forward"]["layout"] == "padded"
    assert "differ by" in summary["forward"]["why"]
    assert "log-probs are read in padded rows; packed ones: differ by" in " ".join(stream.getvalue().split())
    assert as_referred(job, run.dir).training.layout == "padded"
    insisting = Job.model_validate({**masked, "training": {**masked["training"], "layout": "packed"}})
    with pytest.raises(InputError, match=r"training\.layout: packed rows of .* are not exact \(differ by"):
        as_referred(insisting, run.dir)


def test_the_reference_leaves_out_the_scores_that_it_does_not_depend_on(job_table):
    scored = {**PAIR, "chosen_scores": {"r": 1.0}, "rejected_scores": {"r": 0.0}, "reward_gap": 1.0}
    found = Reference(Job.model_validate(job_table))(pa.Table.from_pylist([scored]))
    assert {"reference_chosen_logps", "prompt_ids", "reward_gap"} <= set(found.column_names)
    assert not {"chosen_scores", "rejected_scores"} & set(found.column_names)


def test_the_usual_model_is_packed_and_nothing_is_said(job_table, tmp_path):
    job = Job.model_validate(job_table)
    Reference(job, run_dir=str(tmp_path / "run"))(pa.Table.from_pylist([PAIR]))
    noted = StageFolder(str(tmp_path / "run"), "reference").read_json(FORWARD)
    assert noted == {"layout": "packed", "within": 1e-3, "packable": True, "why": ""}
    assert as_referred(job, str(tmp_path / "run")).training.layout == "packed"


def test_without_a_note_the_job_stays_as_it_is(job_table, tmp_path):
    job = Job.model_validate(job_table)
    assert as_referred(job, str(tmp_path / "run")) is job
    assert reference.summarize(run_of(job, tmp_path / "run"), StageFolder(str(tmp_path / "run"), "reference")) == {}


def committed(run_dir, job, note=None):
    """A reference stage as a run has it; without a note, as earlier versions left it."""
    folder = StageFolder(str(run_dir), "reference")
    folder.begin("k")
    folder.write_parts(pa.table({"prompt_id": ["a"]}), "prompt_id")
    if note:
        folder.write_json(FORWARD, note)
    key = stage_key("reference", reference.settings(job), {})
    folder.commit(Manifest("reference", key, reference.settings(job), {}), "prompt_id")
    return folder


ALONE = replace(reference.STAGE, inputs=())


def plan_of(job, run_dir):
    return planned(job, str(run_dir), [ALONE])["reference"]


def test_a_reference_of_an_earlier_version_is_taken_where_packed_rows_are_exact(job_table, tmp_path):
    job = Job.model_validate(job_table)
    committed(tmp_path / "run", job)
    assert plan_of(job, tmp_path / "run") == "up to date"
    assert as_referred(job, str(tmp_path / "run")) is job


def test_a_reference_of_an_earlier_version_is_made_again_where_they_are_not(masked, tmp_path):
    job = Job.model_validate(masked)
    folder = committed(tmp_path / "run", job)
    assert plan_of(job, tmp_path / "run") == "would run again"
    assert "an earlier version read packed rows, which differ by" in reference.doubt(job, folder)

    noted = committed(tmp_path / "noted", job, {"layout": "padded", "within": 1e-3, "packable": False, "why": "x"})
    assert plan_of(job, tmp_path / "noted") == "up to date"
    assert reference.doubt(job, noted) == ""


def test_nothing_is_gone_on_with_that_an_earlier_version_read_in_packed_rows_that_are_not_exact(masked, tmp_path):
    job = Job.model_validate(masked)
    run = run_of(job, tmp_path / "run", said := io.StringIO())
    resume.begin(run, ALONE, reference.settings(job))
    run.folder("reference").write_parts(pa.table({"prompt_id": ["a"]}), "prompt_id")
    resume.begin(run, ALONE, reference.settings(job))
    assert run.folder("reference").count() == 0
    assert "half made, and begun anew: an earlier version read packed rows" in " ".join(said.getvalue().split())


def test_log_probs_of_a_sibling_that_cannot_be_trusted_are_computed_again(masked, tmp_path, monkeypatch):
    job = Job.model_validate(masked)
    committed(tmp_path / "sibling", job)
    known = []
    monkeypatch.setattr(reference_room, "add_reference", lambda rows, job, found, place: known.append(found))
    run = Run(job, str(tmp_path / "run"), Console(io.StringIO()), lambda *_: False, [str(tmp_path / "sibling")])
    reference.refer(None, run)
    assert not known[0]
