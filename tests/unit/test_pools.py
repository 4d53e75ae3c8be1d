"""What a pool is declared to take is what Ray Data is asked for."""

import inspect
import re
from pathlib import Path

import pytest

from rdpo.cluster.pools import SHARE
from rdpo.config import Job, largest, smallest
from rdpo.modeling.weights import ModelRef
from rdpo.stages.pools import pools_of

PACKAGE = Path(__file__).parents[2] / "rdpo"
REWARDS = [
    {"kind": "classifier", "name": "rm", "model": "m", "gpus": 0.5, "concurrency": (1, 3)},
    {"kind": "implicit", "name": "own", "reference": "m", "gpus": 1, "shards": 3, "concurrency": 2},
    {"kind": "judge", "name": "judge", "rubric": "{{ answer }}", "engine": {"gpus": 4, "cpus": 3, "batch_rows": 5}},
    {"kind": "function", "name": "length", "function": "tests.rewards:length"},
]
ACTORS = {
    "synthesis.engine": ["Teacher"],
    "rewards.rm": ["Classifier"],
    "rewards.own": ["Implicit"],
    "rewards.judge.engine": ["Judge"],
    "reference": ["Reference", "Divergence"],
    "evaluation.engine": ["Answerer"],
}


class Dataset:
    """What Ray Data is asked for, by the name of the actor."""

    def __init__(self):
        self.asked, self.rows = {}, None

    def repartition(self, target_num_rows_per_block):
        self.rows = target_num_rows_per_block
        return self

    def map_batches(self, actor, **options):
        if isinstance(actor, type):
            self.asked[actor.__name__] = {**options, "block_rows": self.rows}
        return self

    def materialize(self):
        return self

    def take_all(self):
        return []


@pytest.fixture
def job(job_table):
    """A job whose pools differ in size, on kinds of nodes."""
    job_table["synthesis"]["engine"] |= {"gpus": 1, "concurrency": (2, 5), "batches_in_flight": 3}
    job_table["evaluation"]["engine"] |= {"gpus": 2, "cpus": 2}
    job_table["reference"] |= {"gpus": 1, "concurrency": 4}
    placement = {"teacher": "spot", "reward": "small", "trainer": "big"}
    return Job.model_validate({**job_table, "rewards": REWARDS, "cluster": {"placement": placement}})


@pytest.fixture
def asked(job, monkeypatch):
    """What is asked for each actor of the job."""
    from rdpo.evaluation import generate
    from rdpo.preference.reference import add_reference
    from rdpo.preference.rewards import judge, score_answers
    from rdpo.synthesis import teacher

    for module in (generate, judge, teacher):
        monkeypatch.setattr(module, "open_crash_counts", lambda: None)
    rows = Dataset()
    monkeypatch.setattr("ray.data.from_arrow", lambda table: rows)

    teacher.synthesize(rows, job)
    score_answers(rows, job, ["response"], together=True)
    add_reference(rows, job)
    generate.answer_prompts([{"prompt_id": "p", "prompt": [], "extra": "{}"}], job, {"start": ModelRef("m")})
    generate.add_divergence(rows, job, "trained", "trained")
    return rows.asked


def test_what_a_pool_declares_is_what_ray_is_asked_for(job, asked):
    pools = {pool.setting: pool for pool in pools_of(job) if pool.stage != "training"}
    assert set(pools) == set(ACTORS)
    for setting, pool in pools.items():
        for actor in ACTORS[setting]:
            options = asked[actor]
            compute = options["compute"]
            taken = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], **(options["resources"] or {})}
            # One that leads the processes of a partitioned model takes nothing itself.
            assert taken == (pool.process if pool.shards == 1 else {"CPU": 0, "GPU": 0})
            assert options["resources"] == ({pool.nodes: SHARE} if pool.shards == 1 else None)
            assert (compute.min_size, compute.max_size) == (smallest(pool.size), largest(pool.size))
            assert compute.max_concurrent_calls_per_actor == pool.at_once
            assert compute.max_tasks_in_flight_per_actor == pool.at_once + 1
            assert options["block_rows"] == options["batch_size"]
            assert (options["runtime_env"] or {}).get("env_vars", {}) == pool.environment


def test_blocks_have_the_rows_of_their_pool(asked):
    rows = {actor: options["block_rows"] for actor, options in asked.items()}
    assert (rows["Judge"], rows["Teacher"], rows["Divergence"]) == (5, 4, 8)
    assert rows["Classifier"] == rows["Implicit"] == rows["Reference"] == 64


def test_ray_is_asked_by_names_that_it_keeps(asked):
    """Loose arguments for Ray's actors end with Ray 2.64."""
    from ray.data import Dataset as RayDataset

    parameters = inspect.signature(RayDataset.map_batches).parameters
    named = {name for name, one in parameters.items() if one.kind is not inspect.Parameter.VAR_KEYWORD}
    for options in asked.values():
        assert set(options) - {"block_rows"} <= named


def test_only_a_pool_asks_for_actors():
    asking = [path for path in PACKAGE.rglob("*.py") if re.search(r"\bcompute=", path.read_text(encoding="utf-8"))]
    assert [str(path.relative_to(PACKAGE)) for path in asking] == ["cluster/pools.py"]
