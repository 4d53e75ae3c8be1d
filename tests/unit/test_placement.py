"""Which pool runs where: kinds of nodes reach every pool, what does not fit is said, side by side or one by one."""

from itertools import accumulate
from types import SimpleNamespace

import pytest

from rdpo.cluster.placement import NODE_GROUP, Nodes, check_room, placement_table
from rdpo.cluster.placement import fit_side_by_side as fit_pools
from rdpo.cluster.pools import SHARE, engine_pool
from rdpo.config import Engine, Job, largest, load_job, smallest
from rdpo.errors import InputError
from rdpo.stages import evaluation, reference, rewards, synthesis, training
from rdpo.stages.pools import pools_of
from tests.support.jobs import write_job

CLASSIFIER = {"kind": "classifier", "name": "rm", "model": "m"}
JUDGE = {"kind": "judge", "name": "judge", "rubric": "{{ answer }}"}
KINDS = {"teacher": "spot", "reward": "small", "trainer": "big"}
HEAD = {"CPU": 4.0, "memory": 1e9, "object_store_memory": 1e9, "node:10.0.0.1": 1.0}


def fit_side_by_side(job, nodes):
    return fit_pools(pools_of(job), job.cluster, nodes)


def machine(gpus, *kinds, cpus=64):
    return {"CPU": cpus, "GPU": gpus, **dict.fromkeys(kinds, 1.0)}


@pytest.fixture
def job_with(job_table):
    def of(*rewards, teacher=0, size=1, streaming="auto", placement=None, **training):
        job_table["synthesis"]["engine"] |= {"gpus": teacher, "concurrency": size}
        function = job_table["rewards"][0] if job_table["rewards"][0]["kind"] == "function" else None
        cluster = {"streaming": streaming, "placement": placement or {}}
        table = {**job_table, "rewards": [function, *rewards], "cluster": cluster}
        return Job.model_validate({**table, "training": {**job_table["training"], **training}})

    return of


@pytest.fixture
def fits(job_with):
    return lambda gpus, *rewards, **job: fit_side_by_side(job_with(*rewards, **job), Nodes([machine(gpus)]))


def test_functions_run_beside_any_teacher(fits):
    assert fits(0)
    assert fits(1, teacher=1)


def test_two_models_do_not_share_the_cpu_unless_the_job_says_so(fits):
    assert not fits(0, CLASSIFIER)
    assert fits(0, CLASSIFIER, streaming="on")
    assert not fits(8, streaming="off")


def test_every_pool_needs_its_gpus_at_its_smallest_size(fits):
    judge = {**JUDGE, "engine": {"gpus": 1, "concurrency": (1, 4)}}
    assert fits(4, {**CLASSIFIER, "gpus": 1}, judge, teacher=2)
    assert not fits(3, {**CLASSIFIER, "gpus": 1}, judge, teacher=2)
    assert not fits(4, {**CLASSIFIER, "gpus": 1}, judge, teacher=2, size=(2, 8))
    assert fits(2, CLASSIFIER, teacher=2)


def test_a_pool_counts_only_the_gpus_of_its_own_kind(job_with):
    judge = {**JUDGE, "engine": {"gpus": 2}}
    job = job_with({**CLASSIFIER, "gpus": 1}, judge, teacher=4, placement=KINDS)
    trainers = machine(8, "big")
    assert fit_side_by_side(job, Nodes([machine(4, "spot"), machine(3, "small"), trainers]))
    assert not fit_side_by_side(job, Nodes([machine(4, "spot"), machine(2, "small"), trainers]))


def test_nodes_that_can_be_started_count_for_a_pool_that_has_them_to_itself(job_with):
    here = Nodes([machine(1, "small")], grows=True)
    one, two = ({**CLASSIFIER, "gpus": 1, "name": name} for name in ("one", "two"))
    assert fit_side_by_side(job_with(one, teacher=4, placement=KINDS), Nodes([HEAD], grows=True))
    assert not fit_side_by_side(job_with(one, two, teacher=4, placement=KINDS), here)
    assert not fit_side_by_side(job_with(one, teacher=4), here)


def test_sizes_of_pools():
    assert (smallest(3), largest(3), smallest((1, 4)), largest((1, 4))) == (3, 3, 1, 4)
    with pytest.raises(ValueError, match=r"write it as \[smallest, largest\]"):
        Engine(concurrency=(4, 1))
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Engine(concurrency=0)


def test_gpus_are_divided_into_groups():
    assert Engine(gpus=8, pipeline_parallel=2).pipeline_parallel == 2
    with pytest.raises(ValueError, match="gpus = 4 cannot be divided into pipeline_parallel = 3"):
        Engine(gpus=4, pipeline_parallel=3)


def test_every_pool_is_placed_by_what_it_does(job_with):
    judge = {**JUDGE, "engine": {"cpus": 3}}
    job = job_with(CLASSIFIER, judge, teacher=2, placement=KINDS, num_workers=(1, 2), cpus_per_worker=4)
    assert [(pool.setting, pool.process) for pool in pools_of(job)] == [
        ("synthesis.engine", {"CPU": 1, "GPU": 2, "spot": 0.001}),
        ("rewards.rm", {"CPU": 1, "GPU": 0, "small": 0.001}),
        ("rewards.judge.engine", {"CPU": 3, "GPU": 0, "small": 0.001}),
        ("reference", {"CPU": 1, "GPU": 0, "big": 0.001}),
        ("training", {"CPU": 4, "GPU": 0, "big": 0.001}),
        ("evaluation.engine", {"CPU": 1, "GPU": 0, "spot": 0.001}),
    ]
    table = list(placement_table(pools_of(job)))
    assert table[1].split() == ["synthesis", "synthesis.engine", "1", "1", "2", "spot"]
    assert table[5].split() == ["training", "training", "1-2", "4", "0", "big"]


def test_pools_that_nobody_starts_are_not_counted(job_with, job_table):
    job_table["synthesis"]["endpoint"] = {"url": "http://teacher/v1", "model": "m"}
    assert [pool.stage for pool in pools_of(job_with(max_steps=0))] == ["reference", "evaluation"]


class Dataset:
    """What Ray Data is asked for."""

    def __init__(self):
        self.asked = {}

    def repartition(self, **_):
        return self

    def map_batches(self, actor, **options):
        self.asked[getattr(actor, "__name__", None)] = options
        return self


def test_kinds_of_nodes_reach_ray_data(job_with):
    from rdpo.evaluation.generate import add_divergence
    from rdpo.preference.reference import add_reference
    from rdpo.preference.rewards import score_answers

    asked = {}
    for placement in (KINDS, {}):
        job, rows = job_with(CLASSIFIER, placement=placement, streaming="on"), Dataset()
        score_answers(rows, job, ["response"], together=True)
        add_reference(rows, job)
        add_divergence(rows, job, "trained", "answer")
        asked[len(placement)] = {name: options.get("resources") for name, options in rows.asked.items()}
    assert {name: asked[3][name] for name in ("Classifier", "Reference", "Divergence")} == {
        "Classifier": {"small": 0.001},
        "Reference": {"big": 0.001},
        "Divergence": {"big": 0.001},
    }
    assert set(asked[0].values()) == {None}


def test_kinds_of_nodes_reach_ray_train(job_with, monkeypatch, tmp_path):
    from rdpo.files.stage_folder import StageFolder
    from rdpo.training import trainer

    monkeypatch.setattr(trainer.ray, "nodes", lambda: [HEAD, HEAD])
    monkeypatch.setattr(trainer, "TorchTrainer", lambda worker, **options: options["scaling_config"])
    folder = StageFolder(str(tmp_path), "training")
    placed, anywhere = (
        trainer._torch_trainer(job_with(placement=kinds, cpus_per_worker=2), str(tmp_path), folder, None)
        for kinds in (KINDS, {})
    )
    assert placed.resources_per_worker == {"CPU": 2, "big": 0.001}
    assert anywhere.resources_per_worker == {"CPU": 2}


@pytest.mark.parametrize("kind", [None, "spot"])
def test_engines_ask_for_their_kind(kind):
    asked = engine_pool("synthesis", "synthesis.engine", Engine(gpus=2), kind).map(Dataset(), Dataset).asked["Dataset"]
    assert (asked["num_gpus"], asked["resources"]) == (2, kind and {"spot": 0.001})


def test_what_does_not_fit_is_said_with_what_would(job_with):
    job = job_with(teacher=4, placement=KINDS)
    wide = [machine(2, "spot"), machine(2, "spot"), machine(0, "big")]
    with pytest.raises(InputError) as caught:
        check_room(pools_of(job), Nodes(wide))
    assert "synthesis.engine: 1 x 1 CPU, 4 GPU on spot does not fit; there is room for 0" in str(caught.value)
    assert "2 x 64 CPU, 2 GPU, spot; 1 x 64 CPU, 0 GPU, big" in str(caught.value)
    with pytest.raises(InputError) as caught:
        check_room(pools_of(job), Nodes([HEAD]))
    assert "no node declares spot" in str(caught.value)
    assert """`ray start --resources='{"spot": 1}'`""" in str(caught.value)
    assert "(1 x 4 CPU, 0 GPU)" in str(caught.value)
    assert check_room(pools_of(job), Nodes([machine(4, "spot"), machine(0, "big")])) == []


def test_pools_that_wait_for_nodes_are_named(job_with):
    waiting = check_room(
        pools_of(job_with(teacher=4, size=(2, 8), placement=KINDS)), Nodes([HEAD, machine(8, "big")], grows=True)
    )
    assert [pool.setting for pool in waiting] == ["synthesis.engine", "evaluation.engine"]
    assert str(waiting[0]) == "1 CPU, 4 GPU on spot"


def test_ray_train_counts_the_workers_of_a_node_by_their_shares():
    """As its elastic policy does: what is set aside is added up, and divided with a floor."""
    taken = list(accumulate([SHARE] * 64))
    assert [total // SHARE for total in taken] == list(range(1, 65))


def test_shares_of_a_gpu_are_counted_whole(job_with):
    job = job_with({**CLASSIFIER, "gpus": 0.1, "concurrency": 10})
    check_room(pools_of(job), Nodes([machine(1)]))
    with pytest.raises(InputError, match="room for 9"):
        check_room(pools_of(job), Nodes([machine(0.9)]))


def test_a_cluster_grows_if_its_nodes_were_started_by_their_type():
    gone = {"Alive": False, "Resources": machine(8), "Labels": {NODE_GROUP: "spot"}}

    def seen(labels):
        alive = {"Alive": True, "Resources": HEAD, "Labels": labels}
        return Nodes.of(SimpleNamespace(nodes=lambda: [alive, gone]))

    assert (seen({}).gpus(), seen({}).grows) == (0, False)
    assert seen({NODE_GROUP: "head"}).grows


def test_placement_is_no_part_of_a_stage(job_with):
    anywhere, placed = job_with(), job_with(placement=KINDS, streaming="off")
    for settings in (synthesis.settings, rewards.settings, reference.settings, training.settings, evaluation.settings):
        assert settings(anywhere) == settings(placed)


@pytest.mark.parametrize("kind", ["GPU", "two words", "", "1x"])
def test_names_that_cannot_be_kinds_are_refused(tmp_path, job_table, kind):
    job_table["cluster"] = {"placement": {"teacher": kind}}
    with pytest.raises(InputError, match=r"cluster\.placement\.teacher"):
        load_job(write_job(tmp_path / "job.toml", job_table))
