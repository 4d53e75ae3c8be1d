"""Annotators: what a job of them may ask for, whose a row is, and what is seen of such a run."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest

from rdpo.cli import main
from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.execution.reader import inner_runs, job_of_run
from rdpo.experiments.annotators import AnnotatedRows, Fitted, _check_rows, _doubts, annotators_of, run_annotators
from rdpo.files.stage_folder import StageFolder
from rdpo.inspection.status import statuses
from rdpo.planning.costs import Rates, stage_costs
from rdpo.report.live import members
from rdpo.stages import prompts
from rdpo.stages.table import names_of
from rdpo.synthesis.annotated import NO_ANNOTATOR
from rdpo.synthesis.prompts import distinguishing, prompt_row
from rdpo.tracking.console import Console
from rdpo.training.row_weights import read_weights
from tests.support.jobs import write_job
from tests.support.made_up import commit


@pytest.fixture
def ready(job_table):
    """A job of ready pairs of annotators."""
    del job_table["synthesis"], job_table["rewards"]
    return {**job_table, "annotators": {"column": "who"}}


@pytest.fixture
def grouped(job_table):
    """A job of groups that are ordered by a reward."""
    pairs = {"chosen": "best", "rejected": "worst", "others": "rest"}
    table = {**job_table, "annotators": {}, "pairs": pairs}
    table["synthesis"] |= {"task": "best_of"}
    return {**table, "training": {**table["training"], "loss": "plackett_luce"}}


def raw(who="kim", **changes):
    return {"prompt": "why?", "chosen": "one", "rejected": "two", "who": who, "split": "train", **changes}


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("training", {"loss": "ipo"}, "the loss ipo is no such likelihood"),
        ("training", {"loss": "sft"}, "the loss sft is no such likelihood"),
        ("pairs", {"chosen": "chosen", "rejected": "rejected", "others": "rest"}, "dpo over a group is no such"),
        ("training", {"reward_as": "weight"}, "no likelihood of its order"),
        ("training", {"reward_as": "soft_label"}, "no likelihood of its order"),
        ("training", {"offset_transform": "log"}, "no probabilities that add up to 1"),
        ("training", {"label_smoothing": 0.1}, "with label_smoothing"),
        ("training", {"margin": 0.5}, "with margin"),
        ("training", {"sft_coef": 0.1}, "with sft_coef"),
        ("training", {"policy_weight": "wpo"}, "with policy_weight"),
        ("training", {"max_steps": 0}, "trains no types"),
        ("training", {"extrapolation": 0.3}, "extrapolation"),
        ("pairs", {"also": [{"chosen": "chosen", "rejected": "rejected"}]}, "no independent rows"),
        ("replay", {"source": "other.jsonl"}, "name no annotator"),
        ("annotators", {"column": "prompt"}, "holds something else"),
        ("annotators", {"types": 1}, "greater than or equal to 2"),
        ("annotators", {"types": 9}, "less than or equal to 8"),
    ],
)
def test_what_is_no_likelihood_of_independent_rows_is_refused(ready, section, changes, said):
    ready[section] = {**ready.get(section, {}), **changes}
    with pytest.raises(ValueError, match=said):
        Job.model_validate(ready)


def test_weights_that_held_out_pairs_select_are_refused(ready):
    ready["pairs"] = {"heldout_fraction": 0.2}
    ready["training"] |= {"select": "best"}
    with pytest.raises(ValueError, match="are no type's"):
        Job.model_validate(ready)


def test_rounds_are_refused(grouped):
    with pytest.raises(ValueError, match="rounds go on from one model"):
        Job.model_validate({**grouped, "rounds": {"count": 2}})


def test_an_order_that_the_teacher_gives_is_no_annotators(grouped):
    grouped["pairs"] = {"chosen": "response_1", "rejected": "response_2"}
    with pytest.raises(ValueError, match="the same for all annotators"):
        Job.model_validate(grouped)


@pytest.mark.parametrize("settings", [{}, {"offset_coef": 0.3}, {"reward_as": "none"}, {"loss": "plackett_luce"}])
def test_pairs_with_and_without_offset_are_taken(ready, settings):
    ready["training"] |= settings
    assert Job.model_validate(ready).fits_types


def test_two_annotators_of_one_pair_are_two_rows(ready):
    job = Job.model_validate(ready)
    ids = [prompt_row("a", line, raw(who), job)["prompt_id"] for line, who in enumerate(["kim", "lou", "kim", " kim "])]
    assert len(set(ids)) == 2
    assert ids[0] == ids[2] == ids[3]
    assert "who" in distinguishing(job)
    assert prompt_row("a", 1, raw(7), job)["prompt_id"] == prompt_row("a", 1, raw("7"), job)["prompt_id"]


@pytest.mark.parametrize("who", [None, "", "  ", True, ["kim"], float("nan")])
def test_a_row_that_names_nobody_is_dropped_with_the_reason_unless_it_is_held_out(ready, who):
    job = Job.model_validate(ready)
    assert prompt_row("a", 1, raw(who), job)["dropped"] == NO_ANNOTATOR
    for split in ("test", "another"):
        assert not prompt_row("a", 1, raw(who, split=split), job).get("dropped")


def test_rows_of_jobs_without_annotators_keep_their_ids_and_keys(ready):
    plain = Job.model_validate({name: table for name, table in ready.items() if name != "annotators"})
    assert prompt_row("a", 1, raw("kim"), plain)["prompt_id"] == prompt_row("a", 1, raw("lou"), plain)["prompt_id"]
    assert "annotators" not in prompts.settings(plain) and "annotators" not in plain.model_dump()
    assert prompts.settings(Job.model_validate(ready))["annotators"] == ["who", "train"]


def test_the_stages_that_types_share_end_with_the_reference(ready):
    job = Job.model_validate(ready)
    assert names_of(job)[-1] == "reference"
    own = job.model_copy(update={"training": job.training.model_copy(update={"row_weights": "w.jsonl"})})
    assert not own.fits_types
    assert names_of(own)[-1] == "model"
    assert names_of(own)[: len(names_of(job))] == names_of(job)
    assert inner_runs(own) == []
    assert inner_runs(job)[:3] == ["steps/0-1", "steps/1-1", "steps/1-2"]
    assert inner_runs(job)[-3:] == ["steps/5-2", "types/1", "types/2"]


def rows_of(*owners, has_groups=False):
    names = sorted(set(owners))
    ids = [f"row{number}" for number in range(len(owners))]
    return AnnotatedRows(ids, names, np.array([names.index(owner) for owner in owners]), has_groups)


def checked(rows, **settings):
    said = io.StringIO()
    job = {"student": {"model": "m"}, "name": "n", "prompts": {"source": "s"}, "annotators": settings}
    _check_rows(rows, Job.model_validate(job).annotators, Console(said))
    return said.getvalue()


def test_fewer_annotators_than_types_are_refused():
    with pytest.raises(InputError, match="2 in the rows that are trained on, and types = 3"):
        checked(rows_of("kim", "lou", "kim"), types=3)


def test_single_pairs_alone_are_warned_of_and_groups_and_several_rows_are_not():
    assert "cannot be told apart" in checked(rows_of("kim", "lou"))
    assert "cannot be told apart" not in checked(rows_of("kim", "lou", "kim"))
    assert "cannot be told apart" not in checked(rows_of("kim", "lou", has_groups=True))


def test_types_that_explain_no_more_than_one_policy_and_types_that_nobody_is_of_are_doubted():
    rows = rows_of("kim", "lou", has_groups=True)
    sure, unsure = np.eye(2), np.array([[0.5, 0.5], [0.45, 0.55]])
    assert list(_doubts(Fitted(1, rows, sure, -1.0, -2.0))) == []
    assert "show no types" in next(_doubts(Fitted(1, rows, sure, -2.0, -2.0)))
    assert "are not told apart" in next(_doubts(Fitted(1, rows, unsure, -1.0, -2.0)))


@pytest.fixture
def run_dir(ready, tmp_path):
    """A run whose prompts are there, and two of its inner runs have begun."""
    place = tmp_path / "run"
    for name in ("", "steps/1-1", "types/2"):
        (place / name).mkdir(parents=True, exist_ok=True)
        weights = {"row_weights": "w.jsonl"} if name else {}
        write_job(place / name / "config.toml", {**ready, "training": {**ready["training"], **weights}})
    folder = StageFolder(str(place), "prompts")
    folder.begin("k")
    job = Job.model_validate(ready)
    rows = [prompt_row("a", line, raw(who), job) for line, who in enumerate(["kim", "lou"])]
    rows.append(prompt_row("a", 3, raw(None, split="test"), job))
    folder.write_parts(pa.Table.from_pylist([{**row, "dropped": None} for row in rows]), "prompt_id")
    return place


def test_status_names_the_run_and_those_within(run_dir):
    found = list(statuses(str(run_dir)))
    assert [one.run_dir for one in found] == [str(run_dir), f"{run_dir}/steps/1-1", f"{run_dir}/types/2"]
    assert [one.stages[-1].stage for one in found] == ["reference", "model", "model"]
    assert members(str(run_dir)) == ["steps/1-1", "types/2"]


def test_rows_are_shown_and_their_annotators_read(run_dir, ready, capsys):
    from rdpo.execution.reader import RunReader

    assert main(["show", str(run_dir), "prompts"]) == 0
    assert "why?" in capsys.readouterr().out
    known = annotators_of(RunReader(str(run_dir)), "who")
    assert sorted(known.values()) == ["", "kim", "lou"]


@pytest.mark.parametrize("command", ["report", "train"])
def test_what_is_asked_of_one_run_names_the_types(run_dir, capsys, command):
    assert main([command, str(run_dir)]) == 2
    assert f"name one of them, as in {run_dir}/types/1" in capsys.readouterr().err


def test_a_dry_run_tells_how_many_trainings_there_are(ready, tmp_path, capsys):
    from tests.support.jobs import write_jsonl

    write_jsonl(tmp_path / "prompts.jsonl", [raw()])
    path = write_job(tmp_path / "job.toml", ready)
    assert main(["run", path, "--dry-run", "--run-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "# reference   would run" in said and "# training" not in said
    assert "# then 11 trainings at most (1 for all annotators, then 2 types in each of at most 5 steps)" in said


def test_a_plan_counts_all_trainings_and_evaluations(grouped):
    rates = Rates("given", {name: 1.0 for name in ("synthesis", "rewards", "reference", "training", "evaluation")})
    grouped["annotators"] = {"types": 3, "steps": 4}
    with_types = {cost.stage: cost.rows for cost in stage_costs(Job.model_validate(grouped), 100, rates, {})}
    del grouped["annotators"]
    without = {cost.stage: cost.rows for cost in stage_costs(Job.model_validate(grouped), 100, rates, {})}
    factors = {stage: with_types[stage] / rows for stage, rows in without.items()}
    assert factors == {"synthesis": 1, "reference": 1, "training": 13, "evaluation": 3}


def test_types_are_not_compared(ready, tmp_path):
    import tomli_w

    from rdpo.experiments.comparison import load_comparison

    (tmp_path / "base.toml").write_text(tomli_w.dumps(ready))
    table = {"name": "two", "job": "base.toml", "baseline": "a", "until": "training", "arms": {"a": {}}}
    (tmp_path / "compare.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(InputError, match="arm a: types of annotators"):
        load_comparison(tmp_path / "compare.toml")


WHO = {"r0": "kim", "r1": "lou", "r2": "kim", "r3": "max"}
"""Rows that are trained on, and whose they are."""
OF_TYPE = {"kim": 0, "lou": 1, "max": 0}


def reference_row(name):
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    logps = {"reference_chosen_logps": -1.0, "reference_rejected_logps": -1.0}
    return {"prompt_id": name, **ids, **logps, "reward_gap": 0.0, "heldout": False}


def losses_of(run_dir):
    """As if each type's policy knew its annotators: 0.1 on their rows and 3 on others; one policy for all: 1."""
    step, number = run_dir.rsplit("/", 1)[1].split("-")
    own = {name: 0.1 if OF_TYPE[who] == int(number) - 1 else 3.0 for name, who in WHO.items()}
    return dict.fromkeys(WHO, 1.0) if step == "0" else own


@pytest.fixture
def made(monkeypatch):
    """The directories of runs that were brought up to date, whose stages are given and not made."""
    directories = []

    def make(run, stages):
        directories.append(run.dir)
        if "/steps/" in run.dir:
            lines = ({"prompt_id": name, "loss": loss} for name, loss in losses_of(run.dir).items())
            text = "".join(json.dumps(line) + "\n" for line in lines)
            run.folder("training").write_bytes("row_losses.jsonl", text.encode())
            return
        prompts = [{"prompt_id": name, "extra": json.dumps({"who": who})} for name, who in WHO.items()]
        prompts += [{"prompt_id": f"h{who}", "extra": json.dumps({"who": who})} for who in OF_TYPE]
        commit(run.dir, "prompts", prompts)
        if "/types/" not in run.dir:
            commit(run.dir, "reference", [reference_row(name) for name in WHO])
            return
        gains = {"kim": 2.0, "lou": -1.0, "max": 1.0}
        rows = [{"prompt_id": f"h{who}", "start_score": 0.5, "trained_score": 0.5 + gains[who]} for who in OF_TYPE]
        commit(run.dir, "evaluation", rows)

    monkeypatch.setattr("rdpo.experiments.annotators.run_stages", make)
    monkeypatch.setattr("rdpo.report.report.write_report", lambda run_dir: f"{run_dir}/report.html")
    monkeypatch.setattr("rdpo.report.report.headline", lambda run_dir: [f"win rate of {run_dir[-1]}"])
    return directories


def test_steps_end_where_nobody_moves_and_each_type_is_published_and_told_of(ready, tmp_path, made):
    """Losses are given, not trained: what is tested is which runs are made, of which weights, and what is said."""
    ready["rewards"] = [{"kind": "function", "name": "length", "function": "tests.rewards:length"}]
    run_dir, said = tmp_path / "run", io.StringIO()
    run_annotators(Job.model_validate(ready), str(run_dir), Console(said))
    names = [directory.removeprefix(f"{run_dir}/") for directory in made[1:]]
    assert made[0] == str(run_dir)
    # From the second step on the responsibilities no longer move.
    assert names[:5] == ["steps/0-1", "steps/1-1", "steps/1-2", "steps/2-1", "steps/2-2"]
    assert names[-2:] == ["types/1", "types/2"]
    last = max(int(name.split("/")[1].split("-")[0]) for name in names if name.startswith("steps"))
    assert last < 5 and not (run_dir / "steps" / f"{last + 1}.json").exists()

    found = json.loads((run_dir / "steps" / f"{last}.json").read_text())
    assert found["annotators"] == ["kim", "lou", "max"]
    likeliest = [max((0, 1), key=row.__getitem__) for row in found["responsibilities"]]
    assert likeliest == [0, 1, 0] and found["moved"] <= 0.01
    assert found["log_likelihood_of_one_policy"] == -4.0
    # Two rows of kim: eta exp(-0.2) against the other type's exp(-6).
    eta = found["shares_in_training"]
    one, other = eta[0] * np.exp(-0.2), eta[1] * np.exp(-6.0)
    assert found["responsibilities"][0][0] == pytest.approx(one / (one + other), rel=1e-12)

    weights = read_weights(str(run_dir / "steps" / f"{last}-2.jsonl"))
    assert weights["r0"] == weights["r2"] < weights["r1"]
    assert sum(weights.values()) == pytest.approx(4.0)

    text = said.getvalue()
    assert "4 rows of 3 annotators, 2 types" in text and "win rate of 1" in text
    assert "the likeliest type of 2 of 3 annotators" in text
    assert "held-out prompts of its annotators: 2, on which the reward moved by +1.500" in text
    assert "held-out prompts of its annotators: 1, on which the reward moved by -1.000" in text


def test_the_jobs_of_types_differ_in_their_weights_alone(ready, tmp_path, made):
    run_annotators(Job.model_validate(ready), str(tmp_path / "run"), Console(io.StringIO()))
    of_type = job_of_run(str(tmp_path / "run" / "types" / "2"))
    assert of_type.name == "tiny-type-2"
    assert of_type.training.row_weights.startswith(str(tmp_path / "run" / "steps"))
    plain = of_type.training.model_copy(update={"row_weights": None})
    assert plain == Job.model_validate(ready).training
    assert not of_type.fits_types
