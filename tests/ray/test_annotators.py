"""Annotators of two opposed tastes, told apart by their groups and not by their pairs; ended in the middle."""

import io

import numpy as np
import pytest
from ray.train import TrainingFailedError

from rdpo.config import Job
from rdpo.experiments.annotators import fit_types
from rdpo.files.stage_folder import StageFolder
from rdpo.tracking.console import Console
from tests.support.jobs import valid_job, write_job, write_jsonl
from tests.support.letters import letters
from tests.support.training import deadly_sink

# Five to seven trainings each.
pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1800)]

ANNOTATORS = 96
QUESTIONS = ("what?", "which one?", "and now?")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("annotators")


@pytest.fixture(scope="module")
def url():
    with letters() as address:
        yield address


@pytest.fixture(scope="module")
def table(tiny_model, place, url, ray_cluster):
    """A job of annotators with one row each; those of odd numbers like what the others do not."""
    job = valid_job(tiny_model, place)
    rows = [
        {"prompt": QUESTIONS[index % len(QUESTIONS)], "annotator": index, "split": "train"}
        for index in range(ANNOTATORS)
    ]
    write_jsonl(place / "prompts.jsonl", [*rows, {"prompt": "held out", "split": "heldout"}])
    job["synthesis"] |= {"endpoint": {"url": url, "model": "m", "concurrency": 8}}
    job["rewards"] = [{"kind": "function", "name": "taste", "function": "tests.rewards:by_taste"}]
    job["pairs"] = {"chosen": "best", "rejected": "worst", "others": "rest"}
    own = {"loss": "plackett_luce", "reward_as": "none", "beta": 1.0, "epochs": 8, "batch_size": 24}
    return {
        **job,
        "annotators": {"types": 2, "steps": 3, "tolerance": 0.05},
        "training": {**job["training"], **own, "learning_rate": 3e-3},
    }


def with_samples(table, place, count):
    """The job with so many answers to each prompt."""
    task = place / f"task{count}.toml"
    write_job(task, {"name": f"letters{count}", "turns": [{"name": "response", "samples": count}]})
    return {**table, "name": f"letters{count}", "synthesis": {**table["synthesis"], "task": str(task)}}


def fitted(table, run_dir):
    said = io.StringIO()
    return fit_types(Job.model_validate(table), str(run_dir), Console(said)), said.getvalue()


@pytest.fixture(scope="module")
def quick(table, place):
    """The job with two steps of three optimizer steps on few rows, a checkpoint after each, and no failures allowed."""
    small = with_samples(table, place, 3)
    small["synthesis"] = {**small["synthesis"], "limit": 24}
    small["annotators"] = {"types": 2, "steps": 2, "tolerance": 0.0}
    small["training"] = {**small["training"], "epochs": 1, "batch_size": 8, "checkpoint_every": 1, "max_failures": 0}
    return small


class EndsAfterAStep(Console):
    """Interrupts the driver once the first E step is done."""

    def tell(self, event, **facts):
        super().tell(event, **facts)
        if event == "em_step":
            raise KeyboardInterrupt


def written(run_dir):
    """What both steps wrote down."""
    return [(run_dir / "steps" / f"{step}.json").read_bytes() for step in (1, 2)]


def test_ended_between_and_within_steps_it_goes_on_to_the_same_responsibilities(quick, place):
    undisturbed, _ = fitted(quick, place / "undisturbed")
    job, broken = Job.model_validate(quick), place / "broken"

    with pytest.raises(KeyboardInterrupt):
        fit_types(job, str(broken), EndsAfterAStep(io.StringIO()))
    made = {name: StageFolder(str(broken / "steps" / name), "training").manifest() for name in ("0-1", "1-1", "1-2")}
    assert all(made.values()) and not (broken / "steps" / "2-1").exists()

    with deadly_sink(2), pytest.raises(TrainingFailedError):
        fitted(quick, broken)
    within = StageFolder(str(broken / "steps" / "2-1"), "training")
    assert within.manifest() is None and within.exists("checkpoints")

    resumed, said = fitted(quick, broken)
    assert np.array_equal(resumed.responsibilities, undisturbed.responsibilities)
    assert written(broken) == written(place / "undisturbed")
    for name, manifest in made.items():
        assert StageFolder(str(broken / "steps" / name), "training").manifest().created == manifest.created
    assert said.count("training    up to date") == 3


def agreement(found):
    """Share of annotators whose likeliest type is that of their taste, whatever the types are called."""
    truth = np.array([int(name) % 2 for name in found.rows.annotators])
    same = float((found.responsibilities.argmax(1) == truth).mean())
    return max(same, 1 - same)


def test_groups_tell_opposed_tastes_apart(table, place):
    found, said = fitted(with_samples(table, place, 6), place / "groups")
    print(said)
    print("agreement from groups", agreement(found))
    assert len(found.rows.annotators) == len(found.rows.ids) > 0.9 * ANNOTATORS
    assert agreement(found) > 0.9
    assert found.log_likelihood > found.single + 10
    assert "cannot be told apart" not in said


def test_pairs_of_the_same_annotators_do_not(table, place):
    pairs = with_samples(table, place, 2)
    pairs["pairs"] = {"chosen": "best", "rejected": "worst"}
    pairs["training"] = {**pairs["training"], "loss": "dpo"}
    pairs["annotators"] = {**pairs["annotators"], "steps": 2}
    found, said = fitted(pairs, place / "pairs")
    print(said)
    print("agreement from pairs", agreement(found))
    assert agreement(found) < 0.8
    assert "cannot be told apart" in said
