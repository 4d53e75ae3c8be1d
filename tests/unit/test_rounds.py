"""Rounds: each round's job, when they end, and what they leave."""

import io

import pytest

from rdpo.config import Job
from rdpo.experiments.rounds import job_of_round, run_rounds
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder
from rdpo.modeling.weights import ModelRef
from rdpo.stages.table import STAGES, stages_of
from rdpo.tracking.console import Console

STARTS = ["dpo-model", "runs/rounds/1/model", "runs/rounds/2/model"]


@pytest.fixture
def dice(job_table):
    """A job whose policy is its own reward, against the model that it came from."""
    own = {"kind": "implicit", "name": "own", "reference": "sft-model"}
    other = {"kind": "implicit", "name": "other", "model": "elsewhere", "reference": "its-start"}
    job_table |= {"rewards": [own, other], "rounds": {"count": 3}}
    job_table["student"] |= {"model": "dpo-model", "revision": "main"}
    return job_table


def models(job):
    own, other = job.rewards
    assert (other.model, other.reference) == ("elsewhere", "its-start")
    return job.student.model, own.reference


def test_the_reference_of_the_implicit_reward_moves_one_round_behind_the_policy(dice):
    jobs = [job_of_round(Job.model_validate(dice), number, STARTS) for number in (1, 2, 3)]
    assert [models(job) for job in jobs] == [
        ("dpo-model", "sft-model"),
        ("runs/rounds/1/model", "dpo-model"),
        ("runs/rounds/2/model", "runs/rounds/1/model"),
    ]
    assert [job.student.revision for job in jobs] == ["main", None, None]
    assert {job.rounds.count for job in jobs} == {1}


def test_the_reference_may_stay(dice):
    dice["rounds"]["reward_reference"] = "fixed"
    jobs = [job_of_round(Job.model_validate(dice), number, STARTS) for number in (2, 3)]
    assert [models(job)[1] for job in jobs] == ["sft-model", "sft-model"]


def test_a_later_round_begins_with_the_whole_model_where_an_adapter_was_merged(dice):
    dice["student"]["adapter"] = "sft"
    jobs = [job_of_round(Job.model_validate(dice), number, STARTS) for number in (1, 2, 3)]
    assert [job.student.adapter for job in jobs] == ["sft", None, None]
    assert [job.student.model for job in jobs] == STARTS
    # The reference of the second round is the start of the first, which has it.
    assert [job.rewards[0].reference_adapter for job in jobs] == [None, "sft", None]
    assert [ModelRef.student(job) for job in jobs[1:]] == [ModelRef(start) for start in STARTS[1:]]
    again = [Job.model_validate(job.model_dump()) for job in jobs]
    assert again == jobs


def test_a_later_round_goes_on_with_the_adapter_that_the_last_one_published(dice):
    dice["student"] |= {"adapter": "sft", "adapter_use": "continue"}
    jobs = [job_of_round(Job.model_validate(dice), number, STARTS) for number in (1, 2, 3)]
    assert {(job.student.model, job.student.revision, job.student.adapter_use) for job in jobs} == {
        ("dpo-model", "main", "continue")
    }
    assert [job.student.adapter for job in jobs] == ["sft", *(f"{start}/adapter" for start in STARTS[1:])]
    assert [models(job)[1] for job in jobs] == ["sft-model", "dpo-model", "runs/rounds/1/model"]
    assert [job.rewards[0].reference_adapter for job in jobs] == [None, "sft", None]


def test_a_policy_against_itself_is_no_reward(dice):
    del dice["rewards"][0]["reference"]
    with pytest.raises(ValueError, match="student against itself"):
        Job.model_validate(dice)


def test_a_round_needs_a_whole_model_to_begin_with(dice):
    dice["training"]["lora"] = {"rank": 4}
    with pytest.raises(ValueError, match=r"set publish\.merge = true"):
        Job.model_validate({**dice, "publish": {"merge": False}})


def test_only_a_reward_can_be_watched(dice):
    dice["rounds"]["watch"] = "nothing"
    with pytest.raises(ValueError, match="watch = 'nothing' is no reward; there are own, other, optimised"):
        Job.model_validate(dice)


def test_a_job_without_replay_leaves_its_stage_out(job_table):
    names = [stage.name for stage in stages_of(Job.model_validate(job_table))]
    optional = ("made", "screening", "selection", "replay", "retention", "suites")
    assert names == [stage.name for stage in STAGES if stage.name not in optional]
    job_table |= {"replay": {"source": "pairs.jsonl"}, "retention": {"source": "texts.jsonl"}}
    job_table |= {"selection": {"prompts": 2}, "suites": [{"kind": "claims"}]}
    job_table["prompts"] = {"made": {"kind": "magpie", "count": 1}}
    assert stages_of(Job.model_validate(job_table)) == STAGES
    (reference,) = [stage for stage in stages_of(Job.model_validate(job_table)) if stage.name == "reference"]
    assert reference.inputs == ("pairs", "replay")


def test_rounds_end_where_the_watched_reward_no_longer_rises(job_table, tmp_path, monkeypatch):
    """Gains are given, not trained: what is tested is which rounds are made and whose model is taken."""
    gains, starts = {1: 0.5, 2: -0.1, 3: 0.7}, []

    def make(run, stages):
        number = int(run.dir.rsplit("/", 1)[1])
        starts.append(run.job.student.model)
        difference = {"mean": gains[number], "low": 0.0, "high": 1.0}
        won = {"reward": "length", "weight": 1.0, "start_mean": 0.0, "trained_mean": 1.0, "win_rate": difference}
        summary = {"prompts": 3, "rewards": [won], "optimised": {"difference": difference}, "kl": None}
        summary["length"] = summary["stop_rate"] = {"start": {"mean": 1.0}, "trained": {"mean": 1.0}}
        for name in ("pairs", "reference", "evaluation", "model"):
            stage_summary = summary if name == "evaluation" else {}
            folder = StageFolder(run.dir, name)
            folder.write_bytes("weights", str(number).encode())
            run.manifests[name] = folder.commit(Manifest(name, "k", {}, {}, summary=stage_summary))

    monkeypatch.setattr("rdpo.experiments.rounds.run_stages", make)
    monkeypatch.setattr("rdpo.report.report.write_report", lambda run_dir: f"{run_dir}/report.html")
    said = io.StringIO()
    job = Job.model_validate(job_table | {"rounds": {"count": 3}})
    run_rounds(job, str(tmp_path / "run"), Console(said))
    assert starts == [job.student.model, str(tmp_path / "run/rounds/1/model")]
    assert "round 2 moved optimised by -0.100: the last one" in said.getvalue()
    published = tmp_path / "run" / "model" / "weights"
    assert published.read_text() == "1"
    before = published.stat()
    run_rounds(job, str(tmp_path / "run"), Console(said))
    assert (published.stat().st_ino, published.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    published.write_text("edited")
    assert (tmp_path / "run" / "rounds" / "1" / "model" / "weights").read_text() == "1"
    published.unlink()
    run_rounds(job, str(tmp_path / "run"), Console(said))
    assert published.read_text() == "1"
    gains[1] = 0.0
    run_rounds(job, str(tmp_path / "run"), Console(said))
    assert "no round raised the watched reward" in said.getvalue()
    assert not (tmp_path / "run" / "model").exists()


def test_a_dry_run_tells_what_round_one_would_do(job_table, tmp_path, capsys):
    from rdpo.cli import main
    from tests.support.jobs import write_job

    path = write_job(tmp_path / "job.toml", job_table | {"rounds": {"count": 2}})
    assert main(["run", path, "--dry-run", "--run-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "# round 1 of 2" in said
    assert "# prompts     would run" in said


@pytest.mark.parametrize("command", ["report", "train"])
def test_a_directory_of_rounds_is_no_single_run(job_table, tmp_path, capsys, command):
    from rdpo.cli import main
    from tests.support.jobs import write_job

    write_job(tmp_path / "config.toml", job_table | {"rounds": {"count": 2}})
    assert main([command, str(tmp_path)]) == 2
    assert f"name one of them, as in {tmp_path}/rounds/1" in capsys.readouterr().err
