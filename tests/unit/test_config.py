"""Job files: every one in the repository loads; a wrong one is explained, field by field."""

import tomllib
from pathlib import Path

import pytest

from rdpo.config import PLACEMENT, Job, Sampling, load_job, to_toml
from rdpo.errors import InputError
from rdpo.execution.keys import sections
from rdpo.experiments.comparison import load_comparison
from rdpo.preference.pairs import scored_answers
from rdpo.synthesis.instructions import load_task
from rdpo.synthesis.prompts import check_templates
from tests.support.jobs import write_job

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").rglob("*.toml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_job_loads(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    if "turns" in table:
        assert load_task(str(path)).turns
        return
    comparison, jobs = load_comparison(path) if "arms" in table else (None, {"": load_job(path)})
    assert not comparison or len(jobs) == len(comparison.variants) * len(comparison.seeds)
    for job in jobs.values():
        check_templates(job.prompts)
        assert scored_answers(job)


def test_there_are_jobs():
    assert JOBS


def test_resolved_job_reads_back_the_same(job_table, tmp_path):
    job = Job.model_validate(job_table)
    (tmp_path / "resolved.toml").write_text(to_toml(job))
    assert load_job(tmp_path / "resolved.toml") == job


def explained(tmp_path, table, *overrides):
    with pytest.raises(InputError) as caught:
        load_job(write_job(tmp_path / "job.toml", table), list(overrides))
    return str(caught.value)


def test_unknown_key_is_refused_with_a_suggestion(tmp_path, job_table):
    job_table["training"]["learning_rte"] = 1e-4
    message = explained(tmp_path, job_table)
    assert "training.learning_rte: unknown key" in message
    assert "did you mean `learning_rate`?" in message
    assert "job.toml" in message


def test_who_asks_for_the_loss_rdpo_is_told_what_it_is_here(tmp_path, job_table):
    job_table["training"]["loss"] = "rdpo"
    assert 'refined DPO is loss = "dpo" with training.offset_coef' in explained(tmp_path, job_table)


def test_wrong_type_names_field_and_value(tmp_path, job_table):
    job_table["training"]["epochs"] = "many"
    message = explained(tmp_path, job_table)
    assert "training.epochs" in message
    assert "many" in message


def test_missing_section_is_named(tmp_path, job_table):
    del job_table["student"]
    assert "student: is required" in explained(tmp_path, job_table)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.batch_size=1", "num_workers"),
        ("training.tokens_per_batch=100", "reference.max_length"),
        ("pairs.chosen=response", "same turn"),
        ("rewards.0.weight=0", "every weight is 0"),
        ("rewards.3.weight=0", "entries 0 to 0"),
        ("training", "section.key=value"),
        ("name.x=1", "not a section"),
    ],
)
def test_relations_and_overrides(tmp_path, job_table, override, said):
    job_table["training"]["num_workers"] = 2
    assert said in explained(tmp_path, job_table, override)


@pytest.mark.parametrize("split", ["heldout", " Heldout", "held-out", "test", "validation", "test_prefs"])
def test_held_out_prompts_are_not_to_be_trained_on(tmp_path, job_table, split):
    job_table["synthesis"]["split"] = split
    said = explained(tmp_path, job_table)
    assert "synthesis.split: these prompts are held out for evaluation; name a split to train on" in said


def test_a_split_may_have_the_name_that_others_give_it(job_table):
    for name, meant in {"train_prefs": "train", " Train": "train", "Mine": "Mine"}.items():
        job_table["synthesis"]["split"] = name
        assert Job.model_validate(job_table).synthesis.split == meant


def test_override_values_are_toml_or_text(tmp_path, job_table):
    path = write_job(tmp_path / "job.toml", job_table)
    job = load_job(path, ["training.beta=0.2", "name=other", "training.lora.rank=4"])
    assert (job.training.beta, job.name, job.training.lora.rank) == (0.2, "other", 4)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"gpus": 2}, "gpus = 2: one process reads on one GPU; give gpus = 1 and shards = 2"),
        ({"gpus": 0.5, "shards": 2}, "gpus = 0.5: each of several shards takes a whole GPU, or none"),
        ({"shards": 2, "concurrency": (1, 2)}, "concurrency: actors of several shards are a fixed number"),
    ],
)
def test_readers_take_the_gpus_that_they_can_use(job_table, section, message):
    implicit = {"kind": "implicit", "name": "own", "reference": "m", **section}
    for table in ({"reference": section}, {"rewards": [implicit]}):
        with pytest.raises(ValueError, match=message):
            Job.model_validate({**job_table, **table})


def test_sampling_that_says_nothing_new_is_the_table_of_before():
    assert Sampling().model_dump() == {"temperature": 0.7, "top_p": 1.0, "max_tokens": 512}
    asked = Sampling(top_k=5, stop=["END"], presence_penalty=0.5)
    assert asked.used == {"top_k": 5, "presence_penalty": 0.5, "stop": ["END"]}
    assert asked.model_dump() == {**Sampling().model_dump(), **asked.used}
    assert asked.untempered().used == {}
    with pytest.raises(ValueError, match="stop"):
        Sampling(stop=[""])


def test_weights_in_four_bits_are_not_partitioned(job_table):
    job_table["student"]["quantization"] = "nf4"
    job_table["training"] |= {"lora": {"rank": 4}, "zero_stage": 1}
    Job.model_validate({**job_table, "reference": {**job_table["reference"], "shards": 1}})
    with pytest.raises(ValueError, match="weights in four bits cannot be partitioned; give shards = 1"):
        Job.model_validate({**job_table, "reference": {**job_table["reference"], "shards": 2}})


def test_no_file_and_no_toml(tmp_path):
    with pytest.raises(InputError, match="no such job file"):
        load_job(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(InputError, match="not valid TOML"):
        load_job(tmp_path / "broken.toml")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(InputError, match="not valid TOML"):
        load_job(tmp_path / "latin.toml")


def test_every_field_is_documented():
    def undocumented(model, seen):
        for name, field in model.model_fields.items():
            inner = [arg for arg in _models(field.annotation) if arg not in seen]
            if not field.description and not _models(field.annotation):
                yield f"{model.__name__}.{name}"
            for arg in inner:
                yield from undocumented(arg, {*seen, arg})

    assert [name for name in undocumented(Job, {Job}) if not name.endswith(".kind")] == []


def _models(annotation):
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in getattr(annotation, "__args__", ()) for model in _models(arg)]


def test_a_placement_field_is_one_wherever_its_name_stands():
    """A setting on file is known by its name alone, so a name cannot be a placement here and something else there."""
    fields = [(name, PLACEMENT in field.metadata) for one in sections(Job) for name, field in one.model_fields.items()]
    marked = {name for name, placement in fields if placement}
    assert {"concurrency", "kv_cache_gib", "num_workers"} <= marked
    assert not [name for name, placement in fields if name in marked and not placement]
