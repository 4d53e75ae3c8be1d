"""Groups through Ray Train and DeepSpeed: any number of workers, ended in the middle, and pairs as groups of two."""

import random
from pathlib import Path

import pytest
import torch
from ray.train import TrainingFailedError
from safetensors.torch import load_file

from rdpo.files.folder import Folder
from rdpo.training.checkpoint import finish_policy
from rdpo.training.row_weights import write_weights
from rdpo.training.trainer import heldout_margins, row_losses
from tests.support.jobs import valid_job
from tests.support.reference_stage import losses, pair, referenced
from tests.support.training import die_at, train, train_alone, trainer_alone

pytestmark = pytest.mark.ray

GROUPS, ANSWERS = 15, (1, 2, 3, 4, 5)


def group(draw, index, others):
    """A group of random text: `others` answers between the chosen one and the rejected one, each with its gap."""
    between = [pair(draw, index)["chosen"] for _ in range(others)]
    own = {"others": between, "others_finished": [True] * others, "heldout": index >= 12}
    return {**pair(draw, index), **own, "gap_others": [draw.uniform(-1, 2) for _ in range(others)]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("groups")


@pytest.fixture(scope="module")
def table(tiny_model, place):
    """A job of six steps on twelve groups, four in a step."""
    job = valid_job(tiny_model, place)
    job["reference"]["max_length"] = 64
    own = {"epochs": 2, "checkpoint_every": 2, "loss": "plackett_luce", "offset_coef": 0.7}
    return {**job, "training": {**job["training"], **own}}


@pytest.fixture(scope="module")
def run_dir(ray_cluster, place, table):
    """A run whose reference stage is done: twelve groups of two to six answers, and three that are held out."""
    draw = random.Random(0)
    return referenced(place, table, [group(draw, index, index % len(ANSWERS)) for index in range(GROUPS)])


@pytest.fixture(scope="module")
def undisturbed(run_dir, table):
    """Metrics and folder of ZeRO-3 on two workers from the first step to the last."""
    return train(run_dir, table, "undisturbed", zero_stage=3, num_workers=2)


@pytest.mark.usefixtures("process_group")
def test_two_workers_train_groups_as_one_does(run_dir, table, undisturbed):
    (one, margins), (two, folder) = train_alone(run_dir, table, zero_stage=1, tokens_per_batch=160), undisturbed
    assert len(one) == 6
    assert losses(two) == pytest.approx(losses(one), abs=1e-3)
    for name in ("groups/accuracies", "groups/tau", "grad_norm"):
        assert [step[name] for step in two] == pytest.approx([step[name] for step in one], rel=2e-2, abs=2e-2), name
    assert heldout_margins(folder) == pytest.approx(margins, abs=2e-2)


@pytest.mark.usefixtures("process_group")
def test_two_workers_train_weighted_groups_as_one_does_and_leave_the_loss_of_each(run_dir, table, place):
    weights = {f"p{index:02d}": index / 5 for index in range(GROUPS)}
    settings = {"row_weights": write_weights(Folder(str(place)), "weights.jsonl", weights)}
    trainer, one = trainer_alone(run_dir, table, **settings, zero_stage=1, tokens_per_batch=160)
    two, folder = train(run_dir, table, "weighted", **settings, zero_stage=3, num_workers=2)
    assert losses(two) == pytest.approx(losses(one), abs=1e-3)

    left = row_losses(folder)
    assert len(left) == 12
    expected = {row["prompt_id"]: row["loss"] for row in trainer.row_losses()}
    assert left == pytest.approx(expected, abs=2e-2)


def test_groups_that_were_interrupted_go_on_to_the_same_losses(run_dir, table, undisturbed):
    with pytest.raises(TrainingFailedError):
        die_at(run_dir, table, "broken", 4, zero_stage=3, num_workers=2)
    resumed, _ = train(run_dir, table, "broken", zero_stage=3, num_workers=2)
    assert losses(resumed) == losses(undisturbed[0])


def test_groups_of_two_publish_the_adapter_and_the_weights_of_pairs(table, tmp_path, ray_cluster):
    """The loss over groups on groups of two, and the loss of pairs on pairs: the same bytes leave both runs."""
    left = {}
    for kind, loss in (("groups", "plackett_luce"), ("pairs", "dpo")):
        draw = random.Random(0)
        rows = [group(draw, index, 0) for index in range(GROUPS)]
        if kind == "pairs":
            rows = [{name: value for name, value in row.items() if "others" not in name} for row in rows]
        run_dir = referenced(tmp_path / kind, table, rows)
        history, folder = train(run_dir, table, "training", loss=loss, lora={"rank": 4, "alpha": 8}, learning_rate=1e-2)

        merged = tmp_path / kind / "merged"
        finish_policy(Path(folder.local("policy")), Path(table["student"]["model"]), merged)
        adapter = load_file(Path(folder.local("policy")) / "adapter_model.safetensors")
        left[kind] = losses(history), adapter, load_file(merged / "model.safetensors")

    assert left["groups"][0] == left["pairs"][0]
    for groups, pairs in zip(left["groups"][1:], left["pairs"][1:], strict=True):
        assert groups.keys() == pairs.keys()
        assert all(torch.equal(groups[name], tensor) for name, tensor in pairs.items())
    assert any(tensor.abs().sum() > 0 for name, tensor in left["groups"][1].items() if "lora_B" in name)
