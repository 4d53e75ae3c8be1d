"""Where pools fit: teacher and rewards side by side or one after the other, and sizes that make sense."""

import pytest

from rdpo.cluster import fit_side_by_side, largest, smallest
from rdpo.config import Engine, Job

CLASSIFIER = {"kind": "classifier", "name": "rm", "model": "m"}
JUDGE = {"kind": "judge", "name": "judge", "rubric": "{{ answer }}"}


@pytest.fixture
def fits(job_table):
    def of(gpus, *rewards, teacher=0, size=1, streaming="auto"):
        job_table["synthesis"]["engine"] |= {"gpus": teacher, "concurrency": size}
        function = job_table["rewards"][0] if job_table["rewards"][0]["kind"] == "function" else None
        job = {**job_table, "rewards": [function, *rewards], "cluster": {"streaming": streaming}}
        return fit_side_by_side(Job.model_validate(job), gpus)

    return of


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
