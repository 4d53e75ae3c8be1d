"""What differs between two runs."""

import pyarrow as pa
import pytest

from rdpo.cli import main
from rdpo.config import Job, to_toml
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder


def make_run(folder, table, shift=0.0, chosen="good", ids=("a", "b", "c"), until="evaluation", drawn=True):
    """A run whose manifests and rows are written by hand; `shift` raises the trained model's scores."""
    folder.mkdir()
    job = Job.model_validate(table)
    (folder / "config.toml").write_text(to_toml(job), encoding="utf-8")
    rewards = [reward.model_dump() for reward in job.rewards]
    settings = {"pairs": job.pairs.model_dump(), "evaluation": {"rewards": rewards}}
    tables = {
        "pairs": {"chosen": [f"{chosen} {name}" for name in ids], "rejected": ["bad"] * len(ids)},
        "evaluation": {
            "start_scores": [{"length": 1.0}] * len(ids),
            "trained_scores": [{"length": 1.0 + shift + place} for place in range(len(ids))],
            "kl": [0.5, None, 0.7][: len(ids)],
            "trained_tokens": [4] * len(ids),
            "trained_finish_reason": ["stop"] * len(ids),
        },
    }
    for name, columns in tables.items():
        stage = StageFolder(str(folder), name)
        dropped = [None] * (len(ids) - 1) + ["too short" if name == "pairs" else None]
        stage.write_parts(pa.table({"prompt_id": list(ids), **columns, "dropped": dropped}), "prompt_id")
        if name == until or until == "evaluation":
            summary = {"kl_answers": 2} if name == "evaluation" and drawn else {}
            made = Manifest(name, str(settings[name]), settings[name], {}, versions={"torch": "1"}, summary=summary)
            stage.commit(made, "prompt_id")
    return str(folder)


@pytest.fixture
def diff(capsys):
    def printed(a, b):
        assert main(["diff", a, b]) == 0
        return capsys.readouterr().out

    return printed


def test_a_run_does_not_differ_from_itself(tmp_path, job_table, diff):
    run = make_run(tmp_path / "a", job_table)
    assert diff(run, run).endswith("no difference: the same settings, rows and results\n")


def test_settings_texts_and_results_that_differ(tmp_path, job_table, diff):
    a = make_run(tmp_path / "a", job_table)
    job_table["pairs"] = {"min_gap": 0.5}
    job_table["student"]["revision"] = "\x1b[31mred"
    b = make_run(tmp_path / "b", job_table, shift=0.5, chosen="better", ids=("a", "b", "d"))
    output = diff(a, b)
    assert "\x1b" not in output and "\\u001b[31mred" in output
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert "pairs.min_gap - 0.5" in lines
    assert "pairs other min_gap" in lines
    assert "evaluation the same settings and inputs, made twice" in lines
    assert "pairs 2 in both: 2 with another chosen answer, 0 with another rejected answer" in lines
    assert "evaluation 3 and 3 rows: 1 only in A (c), 1 only in B (d)" in lines
    assert "held-out prompts: 3 and 3, of which both have 2" in lines
    (trained,) = [line for line in lines if line.startswith("length, trained")]
    assert trained.startswith("length, trained 2.000 (") and trained.endswith(" +0.500 (+0.500 to +0.500)")
    assert any(line.startswith("KL, nats 0.600 (") for line in lines)


def test_log_ratios_of_an_earlier_version_are_not_held_against_kl(tmp_path, job_table, diff):
    output = diff(make_run(tmp_path / "a", job_table, drawn=False), make_run(tmp_path / "b", job_table, shift=0.5))
    lines = {line[:28].strip(): line[28:].split() for line in output.splitlines()}
    assert lines["KL, nats"][0] == "-" and lines["KL, nats"][-1] == "-"
    assert lines["log-ratio, nats"][1:] and lines["log-ratio, nats"][-2:] == ["-", "-"]


def test_runs_without_rewards_are_compared_by_their_answers(tmp_path, job_table, diff):
    runs = [make_run(tmp_path / name, job_table, chosen=name) for name in "ab"]
    for tokens, run in enumerate(runs):
        stage = StageFolder(run, "evaluation")
        bare = {"start_scores": None, "trained_scores": None, "trained_tokens": tokens}
        scored = stage.table().to_pylist()
        manifest = stage.manifest()
        stage.clear()
        stage.write_parts(pa.Table.from_pylist([{**row, **bare, "dropped": None} for row in scored]), "prompt_id")
        stage.commit(manifest, "prompt_id")
    output = diff(*runs)
    assert "tokens" in output and "+1.000" in output and "length, trained" not in output


def test_another_reward_of_the_same_name_is_not_compared_in_silence(tmp_path, job_table, diff):
    a = make_run(tmp_path / "a", job_table)
    job_table["rewards"][0]["function"] = "tests.rewards:other"
    job_table["rewards"].append({"kind": "function", "name": "extra", "function": "tests.rewards:length", "weight": 0})
    output = diff(a, make_run(tmp_path / "b", job_table))
    assert "length is not the same reward in both runs" in output
    assert "extra is a reward of B alone" in output
    assert [line.split() for line in output.splitlines() if "rewards.extra" in line] == [
        ["rewards.extra.kind", "-", '"function"'],
        ["evaluation", "other", *output.split("evaluation  other ")[1].splitlines()[0].split()],
    ]


def test_an_unfinished_run_is_compared_as_far_as_it_has_come(tmp_path, job_table, diff):
    a = make_run(tmp_path / "a", job_table)
    b = make_run(tmp_path / "b", job_table, ids=("a", "b"), until="pairs")
    output = diff(a, b)
    assert "evaluation  finished only in A" in output
    assert "evaluation  3 and 2 rows: 1 only in A (c), 0 only in B" in output
    assert "no evaluation in B yet" in output
