"""Training through Ray Train and DeepSpeed: right losses, whatever the number of workers; resume; export."""

import json
import math
from pathlib import Path

import pyarrow as pa
import pytest

from rdpo.config import Job
from rdpo.storage import Manifest, StageFolder

pytestmark = pytest.mark.ray


@pytest.fixture
def run_dir(ray_cluster, tmp_path, job_table):
    """A run whose reference stage is done: 24 pairs of random tokens, log-probs by the reference actor."""
    import random

    from rdpo.preference.reference import Reference

    draw = random.Random(0)

    def message():
        return [{"role": "assistant", "content": "".join(draw.choices("abcdefgh ", k=draw.randint(4, 24))) + "!"}]

    rows = [
        {
            "prompt_id": f"p{index:02d}",
            "prompt": [{"role": "user", "content": f"question {index}"}],
            "chosen": message(),
            "rejected": message(),
            "chosen_finished": True,
            "rejected_finished": index % 3 > 0,
            "reward_gap": draw.uniform(-1, 2),
        }
        for index in range(24)
    ]
    table = Reference(Job.model_validate(job_table))(pa.Table.from_pylist(rows))
    folder = StageFolder(str(tmp_path), "reference")
    folder.begin("k")
    folder.write_parts(table, "prompt_id")
    folder.commit(Manifest("reference", "k", {}, {}), "prompt_id", 24)
    return str(tmp_path)


def train(run_dir, job_table, name="training", **training):
    from rdpo.training.trainer import train

    table = {**job_table, "training": {**job_table["training"], "epochs": 2, "checkpoint_every": 3, **training}}
    folder = StageFolder(run_dir, name)
    if not folder.exists("in_progress.json"):
        folder.begin("k")
    return train(Job.model_validate(table), run_dir, folder, lambda metrics: None), folder


def gaps(run_dir, steps=1):
    from rdpo.policy.packing import epoch_order
    from rdpo.training.loop import PairTable

    data = PairTable.load(run_dir)
    order = epoch_order(len(data), 0, 0)
    return data.rows(tuple(order[: 4 * steps]))["reward_gap"]


def test_first_loss_is_that_of_policy_equal_to_reference(run_dir, job_table):
    history, _ = train(run_dir, job_table, "dpo", offset_coef=0.0, max_steps=1)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    history, _ = train(run_dir, job_table, "rdpo", offset_coef=0.7, max_steps=1)
    expected = [math.log1p(math.exp(0.7 * gap)) for gap in gaps(run_dir)]
    assert history[0]["loss"] == pytest.approx(sum(expected) / 4, abs=1e-4)
    assert history[0]["offset/negative_share"] == sum(gap < 0 for gap in gaps(run_dir)) / 4


def losses(history):
    return [step["loss"] for step in history]


def test_two_workers_under_zero3_equal_one(run_dir, job_table):
    one, _ = train(run_dir, job_table, "one", zero_stage=0, max_steps=10)
    two, _ = train(run_dir, job_table, "two", zero_stage=3, num_workers=2, max_steps=10)
    small, _ = train(run_dir, job_table, "small", zero_stage=3, num_workers=2, max_steps=10, tokens_per_batch=512)
    assert len(one) == 10
    assert losses(two) == pytest.approx(losses(one), abs=1e-3)
    assert losses(small) == pytest.approx(losses(one), abs=1e-3)
    assert sum(step["rewards/margins"] for step in one[6:]) > 0.1
    assert [step["grad_norm"] for step in two] == pytest.approx([step["grad_norm"] for step in small], rel=1e-2)
    assert two[0]["grad_norm"] > 0


def test_adapter_trains_and_merges(run_dir, job_table):
    import torch
    from safetensors.torch import load_file

    from rdpo.training.checkpoint import finish_policy

    lora = {"rank": 4, "alpha": 8}
    history, folder = train(run_dir, job_table, num_workers=2, lora=lora, learning_rate=1e-2)
    assert sum(step["rewards/margins"] for step in history[6:]) > 0.1
    adapter, merged = Path(folder.local("policy")), Path(folder.local("merged"))
    weights = load_file(adapter / "adapter_model.safetensors")
    assert weights
    assert all(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)
    base = Path(job_table["student"]["model"])
    finish_policy(adapter, base, merged)
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 14
    assert (merged / "tokenizer.json").is_file()


def test_full_weights_are_exported_whole_from_zero3(run_dir, job_table):
    from safetensors.torch import load_file

    _, folder = train(run_dir, job_table, num_workers=2, max_steps=2)
    base = load_file(Path(job_table["student"]["model"]) / "model.safetensors")
    exported = load_file(Path(folder.local("policy")) / "model.safetensors")
    assert {name: tensor.shape for name, tensor in base.items()} == {n: t.shape for n, t in exported.items()}
    assert not list(Path(folder.local("policy")).glob("*.bin"))


def test_interrupted_training_goes_on_as_if_nothing_had_happened(run_dir, job_table):
    """The run dies after its first checkpoint; the same call again gives the undisturbed losses."""
    from ray.train import TrainingFailedError

    whole, _ = train(run_dir, job_table, "whole", num_workers=2)
    with pytest.raises(TrainingFailedError):
        _die_at(run_dir, job_table, step=5)
    resumed, folder = train(run_dir, job_table, "broken", num_workers=2)
    assert losses(resumed) == losses(whole)
    stored = [json.loads(line) for line in folder.read_bytes("metrics.jsonl").decode().splitlines()]
    assert [step["step"] for step in stored] == list(range(1, 13))


def _die_at(run_dir, job_table, step):
    """Train into `broken` with a worker that fails when it reports a step, and no failures allowed."""
    from rdpo.training import trainer

    class Deadly(trainer.MetricsSink):
        def record(self, steps):
            if any(metrics["step"] == step for metrics in steps):
                raise RuntimeError("the machine is gone")
            super().record(steps)

    original, trainer.MetricsSink = trainer.MetricsSink, Deadly
    try:
        train(run_dir, job_table, "broken", num_workers=2, max_failures=0)
    finally:
        trainer.MetricsSink = original
