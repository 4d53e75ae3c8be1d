"""When a stage is made again, when it goes on with what is half made, and what is said of it."""

import io
import re
from dataclasses import asdict, replace

import pyarrow as pa
import pytest

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.execution import resume
from rdpo.execution.keys import former_key, same_settings, stage_key, what_counts
from rdpo.execution.pipeline import is_up_to_date
from rdpo.execution.run import Run
from rdpo.execution.stage import Reads, Stage
from rdpo.files.folder import MANIFEST
from rdpo.files.manifest import Manifest
from rdpo.records import Fingerprint
from rdpo.stages import pairs, reference, training
from rdpo.tracking.console import Console

MEMORY = {
    "tokens_per_batch": 512,
    "gradient_checkpointing": True,
    "logprob_chunk": 7,
    "offload": "optimizer",
    "max_skipped_steps": 3,
    "layout": "padded",
}


def job_with(table, **of_training):
    return Job.model_validate({**table, "training": {**table["training"], **of_training}})


def test_settings_that_save_memory_make_no_training_again_and_others_do(job_table):
    plain = training.settings(Job.model_validate(job_table))
    assert same_settings(plain, training.settings(job_with(job_table, **MEMORY)))
    for changed in ({"learning_rate": 1e-5}, {"batch_size": 2}, {"zero_stage": 2}):
        assert not same_settings(plain, training.settings(job_with(job_table, **changed)))


def test_a_name_means_what_it_means_for_its_kind_of_reward():
    """`batch_size` is memory for a classifier, and the steps for training."""
    rewards = [{"kind": "classifier", "name": "r", "batch_size": size, "answer_only": True} for size in (1, 2)]
    assert same_settings(*({"rewards": [reward]} for reward in rewards))
    assert not same_settings({"batch_size": 1}, {"batch_size": 2})


def test_what_is_known_by_its_content_may_lie_elsewhere():
    one = {"engine": {"dtype": "auto", "compute_dtype": "float32"}, "teacher": "here/model", "weights": "w"}
    other = {"engine": {"dtype": "float32", "compute_dtype": "float32"}, "teacher": "there/model", "weights": "w"}
    assert same_settings(one, other)
    assert not same_settings(one, {**one, "weights": "v"})
    assert not same_settings({**one, "weights": None}, {**other, "weights": None})


def test_arguments_of_the_engine_that_save_memory_do_not_count_and_others_do():
    engines = [{"options": options} for options in ({}, {"max_num_seqs": 8}, {"quantization": "fp8"})]
    assert [same_settings({"engine": engines[0]}, {"engine": engine}) for engine in engines] == [True, True, False]


def test_words_of_a_template_are_never_left_out():
    settings = {"values": {"offload": "a", "gpus": "b"}}
    assert what_counts(settings) == settings


def scored(**scores):
    row = {"prompt_id": "a", "chosen": "x", "chosen_scores": scores, "reward_gap": 1.0}
    return Manifest("pairs", str(scores), {}, {}, columns={name: repr(value) for name, value in row.items()})


def test_a_reward_that_is_only_measured_makes_no_reference_again():
    one, other = scored(r=1.0), scored(r=1.0, measured=2.0)
    assert reference.STAGE.read_of("pairs", one) == reference.STAGE.read_of("pairs", other)
    assert Reads().of(one) != Reads().of(other)


def test_another_file_beside_the_rows_counts():
    one = Manifest("reference", "k", {}, {}, files={"forward.json": "1", "part-1.parquet": "2"}, columns={"c": "3"})
    other_part = replace(one, files={"forward.json": "1", "part-2.parquet": "9"})
    other_file = replace(one, files={**one.files, "forward.json": "9"})
    assert training.STAGE.read_of("reference", one) == training.STAGE.read_of("reference", other_part)
    assert training.STAGE.read_of("reference", one) != training.STAGE.read_of("reference", other_file)


def test_what_pairs_of_one_question_are_held_out_by_is_an_input_of_the_pairs():
    assert "prompts" in pairs.STAGE.inputs


STAGE = Stage(
    "synthesis", (), lambda job: {"seed": job.seed, "engine": {"cpus": 1}}, lambda *_: {}, packages=("torch",)
)


@pytest.fixture
def half_made(job_table, tmp_path):
    """A run whose stage is half made, and what it says."""
    said = io.StringIO()
    run = Run(Job.model_validate(job_table), str(tmp_path / "run"), Console(said), lambda *_: False)
    resume.begin(run, STAGE, {"seed": 0, "engine": {"cpus": 1}})
    run.folder("synthesis").write_parts(pa.table({"prompt_id": ["a"]}), "prompt_id")
    return run, said


def test_what_is_half_made_goes_on_with_settings_that_do_not_count(half_made):
    run, said = half_made
    resume.begin(run, STAGE, {"seed": 0, "engine": {"cpus": 4}})
    assert run.folder("synthesis").count() == 1 and said.getvalue() == ""


def test_the_key_of_earlier_versions_is_not_made_without_need(half_made):
    """For a model of the hub it takes all of its weights."""

    def former():
        raise AssertionError("the weights were asked for")

    run, _ = half_made
    asking = Fingerprint("w", former=former)
    resume.begin(run, STAGE, {"seed": 1, "weights": asking})
    resume.begin(run, STAGE, {"seed": 1, "weights": asking})
    manifest = Manifest("synthesis", stage_key("synthesis", {"weights": asking}, {}), {}, {}, columns={})
    assert is_up_to_date(manifest, STAGE, {"weights": asking}, {})


def test_what_is_half_made_and_begun_anew_is_said_with_the_settings_that_differ(half_made):
    run, said = half_made
    resume.begin(run, STAGE, {"seed": 1, "engine": {"cpus": 4}})
    assert run.folder("synthesis").count() == 0
    assert "half made, and begun anew: other seed" in said.getvalue()


def test_what_another_version_of_a_package_has_half_made_is_not_gone_on_with(half_made, monkeypatch):
    run, _ = half_made
    now = resume.versions()
    monkeypatch.setattr(resume, "versions", lambda: {**now, "torch": "9.9", "datasets": "9.9"})
    refusal = rf"half made with torch {re.escape(now['torch'])}, and here is torch 9\.9.*install torch=="
    with pytest.raises(InputError, match=refusal):
        resume.begin(run, STAGE, {"seed": 0, "engine": {"cpus": 1}})
    assert run.folder("synthesis").count() == 1

    # Nothing is mixed where the stage begins anew, nor by a package that has no part in it.
    resume.begin(run, STAGE, {"seed": 1, "engine": {"cpus": 1}})
    monkeypatch.setattr(resume, "versions", lambda: {**now, "torch": "9.9", "datasets": "9.8"})
    resume.begin(run, STAGE, {"seed": 1, "engine": {"cpus": 1}})


def as_formerly(folder, manifest, key):
    """The folder as an earlier version has left it."""
    old = {name: value for name, value in asdict(replace(manifest, key=key)).items() if name != "columns"}
    folder.write_json(MANIFEST, old)
    return folder.manifest()


def test_a_stage_that_an_earlier_version_made_is_up_to_date_and_its_half_made_one_goes_on(half_made):
    run, _ = half_made
    settings = {"seed": 0, "engine": {"cpus": 1, "dtype": "auto", "compute_dtype": "float32"}}
    before = {"seed": 0, "engine": {"cpus": 1, "dtype": "auto"}}
    folder = run.folder("synthesis")
    key = former_key("synthesis", before, {})

    folder.begin(key)
    folder.write_parts(pa.table({"prompt_id": ["a"]}), "prompt_id")
    resume.begin(run, STAGE, settings)
    assert folder.count() == 1

    manifest = folder.commit(Manifest("synthesis", stage_key("synthesis", settings, {}), settings, {}), "prompt_id")
    assert is_up_to_date(manifest, STAGE, settings, {})
    old = as_formerly(folder, manifest, key)
    assert old.columns is None
    assert is_up_to_date(old, STAGE, settings, {})
    assert not is_up_to_date(old, STAGE, {**settings, "seed": 1}, {})
