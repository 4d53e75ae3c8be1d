"""Hours and dollars of a job: rates measured or given, prices given, nothing guessed."""

import json
from dataclasses import asdict

import pytest

from rdpo.cli import main
from rdpo.cluster.pools import Pool
from rdpo.config import Job, to_toml
from rdpo.errors import InputError
from rdpo.files.folder import IN_PROGRESS, MANIFEST
from rdpo.files.manifest import Manifest
from rdpo.planning.costs import Price, cost_table, load_prices, load_rates, reserved_dollars, stage_costs

MEASURED = {"synthesis": (100, 50.0), "rewards": (100, 20.0), "reference": (60, 30.0), "evaluation": (16, 8.0)}
CREATED, CREATED_S = "2026-11-22T00:45:09Z", 1795308309


def gpu_job(table, **training):
    engine = {"gpus": 2, "concurrency": (1, 4)}
    return Job.model_validate(
        {
            **table,
            "synthesis": {**table["synthesis"], "engine": {**table["synthesis"]["engine"], **engine}},
            "rewards": [{"kind": "classifier", "name": "rm", "model": "m", "gpus": 1}],
            "reference": {**table["reference"], "gpus": 1},
            "training": {**table["training"], "gpus_per_worker": 1, "num_workers": 4, "epochs": 2, **training},
            "evaluation": {**table["evaluation"], "engine": {"gpus": 1}, "limit": 16},
            "cluster": {"placement": {"teacher": "spot", "trainer": "big"}},
        }
    )


@pytest.fixture
def job(job_table):
    return gpu_job(job_table)


@pytest.fixture
def run_dir(job, tmp_path):
    """A finished run of the job with 100 prompts, one engine and two training workers."""
    engine = job.synthesis.engine.model_copy(update={"concurrency": 1})
    small = {
        "synthesis": job.synthesis.model_copy(update={"engine": engine}),
        "training": job.training.model_copy(update={"num_workers": 2}),
    }
    (tmp_path / "config.toml").write_text(to_toml(job.model_copy(update=small)))
    for stage, (rows, seconds) in MEASURED.items():
        commit(tmp_path, Manifest(stage, "", {}, {}, rows_in=rows, seconds=seconds))
    commit(tmp_path, Manifest("training", "", {}, {}, seconds=40.0, summary={"pairs": 50}))
    return tmp_path


def commit(run_dir, manifest, began_ago=None):
    folder = run_dir / manifest.stage
    folder.mkdir(exist_ok=True)
    manifest.created = CREATED
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest)))
    began = CREATED_S - (manifest.seconds if began_ago is None else began_ago)
    (folder / IN_PROGRESS).write_text(json.dumps({"key": "", "began": began}))


@pytest.fixture
def prices():
    return {
        "spot": Price(per_node_hour=10, gpus=4, cpus=32),
        "anywhere": Price(per_gpu_hour=2),
        "big": Price(per_gpu_hour=3, reserved=True),
    }


def test_a_smaller_run_gives_rates_and_rows(job, run_dir, prices):
    costs = {cost.stage: cost for cost in stage_costs(job, 3600, load_rates(str(run_dir)), prices)}
    assert {stage: cost.rows for stage, cost in costs.items()} == {
        "synthesis": 3600,
        "rewards": 3600,
        "reference": pytest.approx(2160),
        "training": pytest.approx(3600),
        "evaluation": 16,
    }
    # 2 rows a second of one engine, four of them; 100 pairs in 40 s on two workers, four of them.
    assert costs["synthesis"].hours == pytest.approx(3600 / 2 / 4 / 3600)
    assert costs["training"].hours == pytest.approx(3600 / 2.5 / 2 / 3600)
    # Four engines of two GPUs take two nodes of four.
    assert costs["synthesis"].dollars == pytest.approx(costs["synthesis"].hours * 20)
    assert costs["rewards"].dollars == pytest.approx(costs["rewards"].hours * 2)
    assert costs["training"].dollars == 0
    assert reserved_dollars(job, 10, prices) == {"big": 10 * 4 * 3}


def test_the_table_adds_up_and_says_what_is_assumed(job, run_dir, prices):
    lines = list(cost_table(job, 3600, load_rates(str(run_dir)), prices))
    numbers = {line.split("  ")[0]: line.split() for line in lines}
    hours = [float(numbers[stage][2]) for stage in (*MEASURED, "training")]
    assert float(numbers["in all"][2]) == pytest.approx(sum(hours), abs=0.03)
    dollars = [float(numbers[stage][-1]) for stage in (*MEASURED, "training", "big, reserved")]
    assert float(numbers["in all"][-1]) == pytest.approx(sum(dollars), abs=0.03)
    text = "\n".join(lines)
    assert "3,600 prompts" in text
    assert str(run_dir) in text
    without = "\n".join(cost_table(job, 3600, load_rates(str(run_dir)), {}))
    assert "dollars" not in without


def test_stages_that_ran_together_take_their_time_once(job, run_dir):
    both = {"rows_in": 100, "seconds": 50.0}
    commit(run_dir, Manifest("synthesis", "", {}, {}, **both, together=["rewards"]))
    commit(run_dir, Manifest("rewards", "", {}, {}, **both, together=["synthesis"]))
    rates = load_rates(str(run_dir))
    lines = {line.split("  ")[0]: line.split() for line in cost_table(job, 36000, rates, {})}
    apart = sum(float(lines[stage][2]) for stage in (*MEASURED, "training"))
    assert float(lines["in all"][2]) == pytest.approx(apart - float(lines["synthesis"][2]), abs=0.03)


def test_steps_that_are_not_taken_cost_nothing(job_table, run_dir):
    few = gpu_job(job_table, max_steps=10)
    costs = {cost.stage: cost for cost in stage_costs(few, 3600, load_rates(str(run_dir)), {})}
    assert costs["training"].rows == 10 * few.training.batch_size
    none = gpu_job(job_table, max_steps=0)
    assert "training" not in {cost.stage for cost in stage_costs(none, 100, load_rates(str(run_dir)), {})}


def test_rates_of_other_actors_an_interrupted_run_or_no_run_are_refused(job, job_table, run_dir):
    rates = load_rates(str(run_dir))
    on_cpu = gpu_job(job_table, gpus_per_worker=0)
    with pytest.raises(InputError, match=r"training has 0 GPU\(s\), there it is 1 GPU"):
        stage_costs(on_cpu, 100, rates, {})
    table = {**job.model_dump(), "rewards": [{"kind": "classifier", "name": "other", "model": "m", "gpus": 1}]}
    with pytest.raises(InputError, match=r"rewards\.other .*no such pool"):
        stage_costs(Job.model_validate(table), 100, rates, {})
    commit(run_dir, Manifest("synthesis", "", {}, {}, rows_in=100, seconds=50.0), began_ago=500)
    with pytest.raises(InputError, match="its synthesis stage was interrupted"):
        load_rates(str(run_dir))
    (run_dir / "synthesis" / MANIFEST).unlink()
    with pytest.raises(InputError, match="its synthesis stage is not finished"):
        load_rates(str(run_dir))


def test_rates_from_a_file_are_of_one_actor(job, tmp_path):
    path = tmp_path / "rates.toml"
    path.write_text("synthesis = 2\nrewards = 5\nreference = 4\ntraining = 1.5\nevaluation = 2\n")
    costs = {cost.stage: cost for cost in stage_costs(job, 3600, load_rates(str(path)), {})}
    assert costs["synthesis"].hours == pytest.approx(1 / 2 / 4)
    assert costs["training"].hours == pytest.approx(2 / 1.5 / 4)
    path.write_text("synthesis = 2\n")
    with pytest.raises(InputError, match="nothing for rewards"):
        stage_costs(job, 3600, load_rates(str(path)), {})
    for wrong, said in {"teacher = 2": "teacher: no such stage", "synthesis = 0": "greater than 0"}.items():
        path.write_text(wrong)
        with pytest.raises(InputError, match=said):
            load_rates(str(path))


def test_what_is_not_known_is_asked_for(job, run_dir, prices):
    rates = load_rates(str(run_dir))
    with pytest.raises(InputError, match="--prompts"):
        list(cost_table(job, None, rates, {}))
    del prices["spot"]
    with pytest.raises(InputError, match=r"none for spot, where synthesis\.engine runs"):
        stage_costs(job, 100, rates, prices)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("spot = {}", "give per_gpu_hour, or per_node_hour"),
        ("spot = { per_gpu_hour = 1, per_node_hour = 2, cpus = 3 }", "give per_gpu_hour, or per_node_hour"),
        ("spot = { per_node_hour = 2 }", "needs the node's cpus"),
        ("spot = { dollars = 2 }", "unknown key"),
        ("spot = 3", "spot"),
    ],
)
def test_wrong_prices_are_explained(tmp_path, table, said):
    (tmp_path / "prices.toml").write_text(table)
    with pytest.raises(InputError, match=said):
        load_prices(str(tmp_path / "prices.toml"))


def test_actors_are_paid_for_in_whole_nodes_and_gpus():
    shared = Pool("rewards", "rewards.rm", 3, 1, 0.5, None)
    wide = Pool("synthesis", "synthesis.engine", 3, 8, 2, "spot")
    node = Price(per_node_hour=10, gpus=4, cpus=12)
    assert Price(per_gpu_hour=2).an_hour(shared) == 4
    assert node.an_hour(shared) == 10
    # Two would fit by their GPUs, one by its CPUs.
    assert node.an_hour(wide) == 30
    with pytest.raises(InputError, match=r"no actor of synthesis\.engine fits"):
        Price(per_node_hour=10, gpus=1, cpus=12).an_hour(wide)
    with pytest.raises(InputError, match="is on the CPU"):
        Price(per_gpu_hour=2).an_hour(Pool("reference", "reference", 1, 1, 0, None))


def test_the_command_shows_placement_and_costs_before_the_model_is_read(capsys, monkeypatch, run_dir, job, tmp_path):
    monkeypatch.setattr("rdpo.planning.plan.plan", lambda *_: iter(["memory"]))
    rates = tmp_path / "rates.toml"
    rates.write_text("synthesis = 2\nrewards = 5\nreference = 4\ntraining = 1.5\nevaluation = 2\n")
    command = ["plan", str(run_dir / "config.toml"), "--prompts", "10"]
    assert main([*command, "--rates", str(rates)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("synthesis.engine") < printed.index("in all") < printed.index("memory")
    assert main([*command, "--prices", "prices.toml"]) == 2
    assert "dollars need hours" in capsys.readouterr().err
