"""Models and files of a run, by the fingerprints in its manifests."""

from rdpo.config import Job
from rdpo.files.manifest import Manifest
from rdpo.report.provenance import ReadSource, sources
from rdpo.stages.table import STAGES
from tests.support.jobs import write_jsonl


def test_the_lineage_of_a_job_names_its_sources_and_who_read_them(job_table, tmp_path):
    write_jsonl(tmp_path / "texts.jsonl", [{"prompt": "a", "answer": "b"}])
    job_table["retention"] = {"source": str(tmp_path / "texts.jsonl")}
    job = Job.model_validate(job_table)
    settings = {
        stage.name: stage.settings(job)
        for stage in STAGES
        if stage.name in ("prompts", "synthesis", "rewards", "training", "retention")
    }
    found = sources({name: Manifest(name, "k", of, {}) for name, of in settings.items()}, job.student.model)
    assert [(source.name, source.stages) for source in found] == [
        (job.prompts.source, ["prompts"]),
        (job.student.model, ["synthesis", "training"]),
        ("tests.rewards:length", ["rewards"]),
        (str(tmp_path / "texts.jsonl"), ["retention"]),
    ]
    assert all(len(source.fingerprint) == 32 for source in found)


def test_a_model_that_changed_between_two_stages_stands_twice():
    manifests = {
        stage: Manifest(stage, "k", {"student": {"model": "m", "weights": weights}}, {})
        for stage, weights in (("reference", "1"), ("training", "2"))
    }
    assert sources(manifests, "m") == [ReadSource("m", "1", ["reference"]), ReadSource("m", "2", ["training"])]
