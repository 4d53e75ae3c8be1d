"""Comparison files: every arm is the base job with its changes; what is wrong is said with the arm's name."""

import io
import json
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pytest
import tomli_w

from rdpo.config.comparison import Part, merged
from rdpo.errors import InputError
from rdpo.execution.pipeline import run_stages
from rdpo.execution.run import Run
from rdpo.experiments.comparison import arm_dir, check_heldout, load_comparison, run_arms
from rdpo.files.stage_folder import StageFolder
from rdpo.synthesis.prompts import SCHEMA, prompt_row
from tests.support.jobs import write_job

LENGTH = {"kind": "function", "name": "length", "function": "tests.rewards:length"}
ARMS = {"dpo": {"training": {"offset_coef": 0.0}}, "rdpo": {"training": {"offset_coef": 0.5}}}


@pytest.fixture
def write(job_table, tmp_path):
    write_job(tmp_path / "base.toml", job_table)

    def written(**changes):
        table = {"name": "two", "job": "base.toml", "baseline": "dpo", "seeds": [0, 1], "arms": ARMS, **changes}
        (tmp_path / "compare.toml").write_text(tomli_w.dumps(table))
        return tmp_path / "compare.toml"

    return written


def test_every_arm_and_seed_is_a_job(write):
    _, jobs = load_comparison(write(all={"training": {"beta": 0.3}}))
    assert list(jobs) == [("dpo", 0), ("dpo", 1), ("rdpo", 0), ("rdpo", 1)]
    job = jobs["rdpo", 1]
    assert (job.name, job.seed, job.training.beta, job.training.offset_coef) == ("rdpo-1", 1, 0.3, 0.5)
    assert job.training.batch_size == 4


def test_each_arm_is_run_in_every_value_of_what_varies(write):
    comparison, jobs = load_comparison(write(vary={"key": "pairs.flip", "values": [0.0, 0.4]}, until="training"))
    assert list(jobs)[::2] == [("dpo@0", 0), ("rdpo@0", 0), ("dpo@0.4", 0), ("rdpo@0.4", 0)]
    assert [job.pairs.flip for job in jobs.values()] == [0.0] * 4 + [0.4] * 4
    job = jobs["rdpo@0.4", 1]
    assert (job.training.offset_coef, job.seed, job.name) == (0.5, 1, "rdpo-0.4-1")
    assert comparison.rivals["rdpo@0.4"] == "dpo@0.4"
    assert comparison.rivals["dpo@0"] == "dpo@0"


def test_values_that_differ_late_in_their_digits_are_arms_of_their_own(write):
    close = [0.1234567, 0.1234568, 0.5, 1e22, 0.0]
    comparison, jobs = load_comparison(write(vary={"key": "training.offset_coef", "values": close}))
    assert len(jobs) == len(close) * len(ARMS) * 2
    assert len({arm_dir("run", *run) for run in jobs}) == len(jobs)
    arms = list(dict.fromkeys(arm for arm, _ in jobs))[::2]
    assert arms == ["dpo@0.1234567", "dpo@0.1234568", "dpo@0.5", "dpo@1e22", "dpo@0"]
    assert comparison.rivals["rdpo@0.1234567"] == "dpo@0.1234567"
    with pytest.raises(InputError, match=r"--value 0.1234569: the values are 0.1234567, 0.1234568, 0.5"):
        comparison.of(Part(values=[0.1234569]))


def test_an_entry_of_a_list_can_vary_and_arms_may_weigh_rewards_in_other_ways(write):
    two = {"rewards": [LENGTH, {**LENGTH, "name": "size", "weight": 0.0}]}
    _, jobs = load_comparison(write(all=two, vary={"key": "rewards.1.weight", "values": [0.5, 2.0]}))
    assert {arm: job.rewards[1].weight for (arm, _), job in jobs.items()} == {
        "dpo@0.5": 0.5,
        "rdpo@0.5": 0.5,
        "dpo@2": 2.0,
        "rdpo@2": 2.0,
    }


def test_merging_leaves_the_base_as_it_is():
    base = {"a": {"b": 1, "c": [1]}, "d": 2}
    assert merged(base, {"a": {"b": 5}, "e": {"f": 1}}) == {"a": {"b": 5, "c": [1]}, "d": 2, "e": {"f": 1}}
    assert base == {"a": {"b": 1, "c": [1]}, "d": 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"baseline": "sft"}, "baseline = 'sft' is no arm; the arms are dpo, rdpo"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"arms": {"dpo": {}, "a/b": {}}}, "arm 'a/b'"),
        ({"arms": {"dpo": {"training": {"bta": 1}}}}, "arm dpo: 1 problem.*\n.*bta: unknown key"),
        ({"job": "none.toml"}, "none.toml: no such job file"),
        ({"arm": {}}, "arm: unknown key"),
        ({"vary": {"key": "flip", "values": [0, 1]}}, "vary.key: "),
        ({"vary": {"key": "pairs.flip", "values": [0.5, 0.25, 0.50]}}, "vary.values: 0.5 is given twice"),
        ({"vary": {"key": "training.offset_coef", "values": [0.0, -0.0]}}, "vary.values: 0 is given twice"),
        (
            {"vary": {"key": "pairs.min_gap", "values": [-1, 1]}, "arms": {"dpo": {}, "dpo-": {}}},
            "arms dpo@-1 and dpo-@1 would share the directory arms/dpo--1-0",
        ),
        (
            {"arms": {**ARMS, "other": {"rewards": [{**LENGTH, "name": "size"}]}}},
            "the same reward 'length'.*weight = 0",
        ),
        (
            {"controls": ["rdpo"], "arms": {"dpo": {}, "rdpo": {"pairs": {"flip": 0.5, "min_gap": 0.0}}}},
            r"arm rdpo: pairs\.flip turns pairs round before pairs\.min_gap looks .* set pairs\.random_sides = true",
        ),
        ({"vary": {"key": "rewards.1.weight", "values": [0, 1]}}, "the list has entries 0 to 0"),
        ({"vary": {"key": "pairs.flop", "values": [0, 1]}}, "arm dpo@0: 1 problem.*\n.*flop: unknown key"),
    ],
)
def test_what_is_wrong_is_said(write, changes, said):
    with pytest.raises(InputError, match=said):
        load_comparison(write(**changes))


def test_a_stage_of_a_sibling_is_taken_over_and_never_written_to(write, tmp_path):
    from rdpo.execution.stage import Stage
    from rdpo.tracking.console import Console

    _, jobs = load_comparison(write())
    made = []

    def execute(run, folder, meter):
        made.append(run.dir)
        folder.write_parts(pa.table({"prompt_id": ["a"], "by": [run.dir]}), "prompt_id")
        return {"rows_in": 1}

    def bring_up(name, value, *siblings):
        stage = Stage("prompts", (), lambda job: {"value": value}, execute)
        run = Run(jobs["dpo", 0], str(tmp_path / name), Console(io.StringIO()), lambda *_: False, siblings)
        run_stages(run, [stage])
        return StageFolder(run.dir, "prompts").table()["by"].to_pylist()

    first = str(tmp_path / "first")
    assert bring_up("first", 1) == [first]
    assert bring_up("second", 1, first) == [first]
    assert bring_up("second", 2, first) == [str(tmp_path / "second")]
    assert bring_up("first", 1) == [first]
    assert made == [first, str(tmp_path / "second")]


def test_some_arms_are_compared_with_the_baseline_alone(write):
    path = write(arms={**ARMS, "sft": {"training": {"loss": "sft"}}})
    comparison, jobs = load_comparison(path, Part(["sft"]))
    assert list(comparison.arms) == ["dpo", "sft"] == list(dict.fromkeys(arm for arm, _ in jobs))
    with pytest.raises(InputError, match=r"--arm sf: .*did you mean `sft`.*; the arms are dpo, rdpo, sft"):
        load_comparison(path, Part(["sf"]))


def test_one_value_and_another_last_stage_can_be_wanted(write):
    path = write(vary={"key": "pairs.flip", "values": [0.0, 0.2, 0.4]}, until="training")
    comparison, jobs = load_comparison(path, Part(["rdpo"], [0.4], "evaluation"))
    assert [arm for arm, _ in jobs][::2] == ["dpo@0.4", "rdpo@0.4"]
    assert comparison.until == "evaluation"
    with pytest.raises(InputError, match="the values are 0, "):
        load_comparison(path, Part(values=[0.3]))
    with pytest.raises(InputError, match="nothing varies"):
        load_comparison(write(), Part(values=[0.3]))


def compared_prompts(write, tmp_path, monkeypatch, **changes):
    """What `check_heldout` does to a comparison over 1,000 prompts, whose prompts stages are made without a Ray."""
    from rdpo.tracking.console import Console

    lines = "".join(json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(1000))
    (tmp_path / "prompts.jsonl").write_text(lines)
    made = []

    def take(run, stages):
        assert [stage.name for stage in stages] == ["prompts"]
        rows = [prompt_row("a", line, {"prompt": f"question {line}"}, run.job) for line in range(1000)]
        folder = run.folder("prompts")
        folder.begin("k")
        folder.write_parts(pa.Table.from_pylist(rows, schema=SCHEMA), "prompt_id")
        made.append({row["prompt_id"] for row in rows if row["split"] == "heldout"})

    monkeypatch.setattr("rdpo.experiments.comparison.run_stages", take)
    comparison, jobs = load_comparison(write(seeds=[0, 1, 2], **changes))
    check_heldout(comparison, jobs, str(tmp_path / "run"), Console(io.StringIO()))
    return made


def test_arms_and_seeds_are_evaluated_on_the_same_prompts(write, tmp_path, monkeypatch):
    templates = {"prompts": {"templates": ["Story: {{ prompt }}", "Tell me: {{ prompt }}"]}}
    made = compared_prompts(write, tmp_path, monkeypatch, all=templates)
    assert len(made) == 6
    assert all(prompts == made[0] for prompts in made)
    assert 70 < len(made[0]) < 130


def test_the_look_at_the_prompts_asks_the_lock_too(write, tmp_path, monkeypatch):
    from rdpo.tracking.console import Console

    def lost():
        raise InputError("another rdpo command took over this run")

    monkeypatch.setattr("rdpo.experiments.comparison.locked", lambda *_, **__: nullcontext(lost))
    monkeypatch.setattr("rdpo.experiments.comparison.run_stages", lambda run, stages: run.check())
    comparison, jobs = load_comparison(write())
    for brought in (check_heldout, run_arms):
        with pytest.raises(InputError, match="took over"):
            brought(comparison, jobs, str(tmp_path / "run"), Console(io.StringIO()))


@pytest.mark.parametrize("change", [{"prompts": {"heldout_fraction": 0.2}}, {"evaluation": {"limit": 7}}])
def test_arms_with_other_held_out_prompts_are_refused_before_the_first_run(write, tmp_path, monkeypatch, change):
    with pytest.raises(InputError, match=r"dpo \(seed 0\) would be evaluated on \d+ .* and rdpo \(seed 0\) on \d+, of"):
        compared_prompts(write, tmp_path, monkeypatch, arms={"dpo": {}, "rdpo": change})
    assert not compared_prompts(write, tmp_path, monkeypatch, arms={"dpo": {}, "rdpo": change}, until="training")


def test_one_seed_alone_is_brought_up_to_date(write, tmp_path, monkeypatch):
    from rdpo.tracking.console import Console

    runs = []
    monkeypatch.setattr("rdpo.experiments.comparison.run_stages", lambda run, stages: runs.append(run))
    comparison, jobs = load_comparison(write())
    screen = io.StringIO()
    run_arms(comparison, jobs, str(tmp_path / "run"), Console(screen), seeds=[1])
    assert [Path(run.dir).name for run in runs] == ["dpo-1", "rdpo-1"]
    assert {Path(sibling).name for sibling in runs[0].siblings} == {"dpo-0", "rdpo-0", "rdpo-1"}
    with pytest.raises(InputError, match=r"--seed 7: the comparison's seeds are 0, 1"):
        run_arms(comparison, jobs, str(tmp_path / "run"), Console(screen), seeds=[0, 7])
    assert len(runs) == 2
