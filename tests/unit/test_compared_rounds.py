"""Arms with rounds in a comparison: every round is made, and held against the baseline after as many."""

import io
from pathlib import Path

import pytest
import tomli_w

from rdpo.errors import InputError
from rdpo.evaluation import retention
from rdpo.execution.reader import MARKER
from rdpo.experiments.arms import arm_results
from rdpo.experiments.comparison import load_comparison, run_arms, runs_in
from rdpo.experiments.controls import control_lines
from rdpo.experiments.foreseen import foreseen
from rdpo.experiments.measured import added_up, comparable, from_the_first, left_out, rivals_of
from rdpo.tracking.console import Console

ARMS = {"dpo": {"rounds": {"count": 2}}, "dice": {"rounds": {"count": 3}}, "once": {}}


@pytest.fixture
def write(job_table, tmp_path):
    def written(**changes):
        (tmp_path / "base.toml").write_text(tomli_w.dumps(job_table))
        table = {"name": "rounds", "job": "base.toml", "baseline": "dpo", "arms": ARMS} | changes
        (tmp_path / "compare.toml").write_text(tomli_w.dumps(table))
        return load_comparison(tmp_path / "compare.toml")

    return written


def test_each_round_is_a_run_that_begins_with_the_model_before(write, tmp_path):
    comparison, jobs = write()
    runs = {run.label: run for run in runs_in(jobs, str(tmp_path / "run"))}
    assert list(runs) == ["dpo, round 1", "dpo, round 2", "dice, round 1", "dice, round 2", "dice, round 3", "once"]
    first, second = runs["dice, round 1"], runs["dice, round 2"]
    assert first.job.student.model == jobs["dice", 0].student.model
    assert second.job.student.model == f"{first.folder}/model"
    assert Path(second.folder) == tmp_path / "run" / "arms" / "dice-0" / "rounds" / "2"
    assert Path(runs["once"].folder) == tmp_path / "run" / "arms" / "once-0"
    assert rivals_of(comparison, runs.values()) == {
        "dpo, round 1": "dpo, round 1",
        "dpo, round 2": "dpo, round 2",
        "dice, round 1": "dpo, round 1",
        "dice, round 2": "dpo, round 2",
        # After its last, where it has no third.
        "dice, round 3": "dpo, round 2",
        "once": "dpo, round 1",
    }


def test_rounds_are_made_one_after_the_other_and_publish_but_for_the_last(write, tmp_path, monkeypatch):
    made = []

    def make(run, stages):
        made.append((Path(run.dir).relative_to(tmp_path / "run" / "arms"), stages[-1].name))

    monkeypatch.setattr("rdpo.experiments.comparison.run_stages", make)
    comparison, jobs = write()
    run_arms(comparison, jobs, str(tmp_path / "run"), Console(io.StringIO()))
    assert [(str(folder), last) for folder, last in made] == [
        ("dpo-0/rounds/1", "model"),
        ("dpo-0/rounds/2", "evaluation"),
        ("dice-0/rounds/1", "model"),
        ("dice-0/rounds/2", "model"),
        ("dice-0/rounds/3", "evaluation"),
        ("once-0", "evaluation"),
    ]
    # The arm's directory is a run of several rounds, for `rdpo status` and the others.
    assert (tmp_path / "run" / "arms" / "dice-0" / MARKER).exists()


def rows(start, trained, kl=1.0, prompts=40):
    """Prompts whose score is drawn around a mean that training moves."""
    return [
        {
            "prompt_id": f"p{index}",
            "start_scores": {"plain": start + index % 5},
            "trained_scores": {"plain": trained + index % 5},
            "trained_tokens": 9,
            "drawn_tokens": 9,
            "kl": kl,
        }
        for index in range(prompts)
    ]


def test_a_round_is_measured_from_the_start_of_the_first(write, tmp_path):
    comparison, jobs = write(controls=["dice"])
    runs = runs_in(jobs, str(tmp_path / "run"))
    # Each round gains 1 over the one before; of the control 2.
    measured = {}
    for run in runs:
        step = 2 if run.arm == "dice" else 1
        measured[run] = rows(step * (run.number - 1), step * run.number)
    weights = {run.label: {"plain": 1.0} for run in runs}
    results = arm_results(dict(from_the_first(measured)), weights, rivals_of(comparison, runs))
    found = {result.arm: result for result in results}
    assert [found[f"dice, round {number}"].difference.mean for number in (1, 2, 3)] == [2, 4, 6]
    assert found["dpo, round 2"].difference.mean == 2
    assert found["dice, round 2"].wins_baseline.mean == 1
    assert found["dpo, round 2"].wins_baseline.mean == 0.5
    # It is from the start of its own round.
    assert found["dice, round 1"].kl.mean == 1
    assert found["dice, round 2"].kl is None
    said = list(control_lines(comparison, results, []))
    assert [line.split(" beats")[0] for line in said[:-1]] == [f"the control dice, round {n}" for n in (1, 2, 3)]


def test_what_texts_lose_adds_up_over_the_rounds(write, tmp_path):
    _, jobs = write()
    runs = [run for run in runs_in(jobs, str(tmp_path / "run")) if run.arm == "dice"]
    lost = {run: [{"prompt_id": "a", "kl": -float(run.number), "kl_length": 10}] for run in runs}
    assert [of_run[0]["kl"] for _, of_run in added_up(lost)] == [-1, -3, -6]
    assert retention.table(dict(added_up(lost)))[-1].startswith("dice, round 3  1.822")


def test_an_implicit_reward_that_goes_along_with_the_rounds_is_not_compared(write, tmp_path, tiny_model):
    own = {"kind": "implicit", "name": "own", "reference": tiny_model}
    plain = {"kind": "function", "name": "plain", "function": "tests.rewards:length", "weight": 0}
    for follows, kept in (("previous", {"plain": 0}), ("fixed", {"own": 1, "plain": 0})):
        arms = {"dpo": {"rounds": {"count": 2, "reward_reference": follows}}}
        _, jobs = write(arms=arms, all={"rewards": [own, plain], "pairs": {"heldout_fraction": 0.1}})
        said = left_out(runs_in(jobs, "run"))
        assert ("own is another reward in each round, and is not compared" in said) == (follows == "previous")
        assert said[-1] == "held-out pairs are others in each round, and are not compared"
        assert set(map(tuple, (of.items() for of in comparable(runs_in(jobs, "run")).values()))) == {
            tuple(kept.items())
        }


def test_a_dry_run_tells_of_every_round(write, tmp_path):
    lines = list(map(str, foreseen(*write(), str(tmp_path / "run"))))
    assert [line.partition(", seed 0: ")[0] for line in lines] == [
        "dpo, round 1",
        "dpo, round 2",
        "dice, round 1",
        "dice, round 2",
        "dice, round 3",
        "once",
    ]
    assert lines[0].endswith("evaluation, model")
    assert lines[1].endswith("evaluation")


def test_rounds_need_answers_to_be_compared_by(write):
    with pytest.raises(InputError, match=r"arm dpo: each of several rounds has pairs of its own, .* set until ="):
        write(until="training")
