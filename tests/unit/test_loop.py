"""One optimizer step on a DeepSpeed engine, in this process: every ZeRO stage, and losses that are not numbers."""

import math

import pyarrow as pa
import pytest
import torch

from rdpo.config import Job
from rdpo.modeling.packing import PairSize
from rdpo.training.loop import NonFiniteStep, PairTable, Trainer
from tests.support.jobs import valid_job

PAIRS = 4


pytestmark = pytest.mark.usefixtures("process_group")


def pairs(poisoned=()):
    """Four pairs; a poisoned one has an infinite reference log-prob, which makes its loss infinite."""
    rows = [
        {
            "prompt_id": f"p{index}",
            "prompt_ids": [10 + index, 20, 30],
            "chosen_ids": [40, 50 + index],
            "rejected_ids": [60, 70, 80 + index],
            "reference_chosen_logps": math.inf if index in poisoned else -11.0,
            "reference_rejected_logps": -16.0,
            "reward_gap": 0.5,
        }
        for index in range(PAIRS)
    ]
    return PairTable(pa.Table.from_pylist(rows), [PairSize(3, 2, 3)] * PAIRS)


def trainer_of(model, place, data, dtype="float32", quantization="none", **training):
    table = valid_job(model, place)
    table["student"] |= {"dtype": dtype, "quantization": quantization}
    table["reference"]["max_length"] = 64
    settings = {"zero_stage": 0, "num_workers": 1, "warmup_ratio": 0.0, "schedule": "constant", "learning_rate": 1e-2}
    job = Job.model_validate({**table, "training": {**table["training"], **settings, **training}})
    return Trainer(job, data, torch.device("cpu"))


def weights(trainer):
    from rdpo.training.checkpoint import gathered_state

    return gathered_state(trainer.engine.module.model, adapter_only=False)


def changed(before, after):
    return sum(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (0, "bfloat16"), (3, "bfloat16")],
)
def test_a_step_that_is_not_finite_is_left_out_and_the_next_one_taken(tiny_model, tmp_path, stage, dtype):
    trainer = trainer_of(tiny_model, tmp_path, pairs(poisoned=[2]), dtype, zero_stage=stage, max_skipped_steps=1)
    start = weights(trainer)
    skipped = trainer.step(0, 9, [0, 2])
    assert (skipped["skipped"], trainer.skipped) == (1.0, 1)
    assert not math.isfinite(skipped["loss"])
    assert changed(start, weights(trainer)) == 0
    taken = trainer.step(1, 9, [0, 1])
    assert taken["skipped"] == 0
    assert 0 < taken["grad_norm"] < math.inf
    assert taken["tflops_per_worker"] > 0 and "mfu" not in taken
    after = weights(trainer)
    assert changed(start, after) > 5
    with pytest.raises(NonFiniteStep, match="rows of the batch: p3, p2"):
        trainer.step(2, 9, [3, 2])
    assert changed(after, weights(trainer)) == 0


def test_a_skipped_step_leaves_no_trace_in_the_next(tiny_model, tmp_path):
    """The gradient of the finite pairs of a skipped step is not carried over."""
    histories = []
    for bad_first in (True, False):
        trainer = trainer_of(tiny_model, tmp_path, pairs(poisoned=[2]), zero_stage=3, max_skipped_steps=1)
        if bad_first:
            trainer.step(0, 9, [0, 2])
        histories.append([trainer.step(0, 9, [0, 1])["loss"], trainer.step(1, 9, [1, 3])["loss"]])
    assert histories[0] == histories[1]


def test_stages_give_the_same_losses_and_gradient_norms(tiny_model, tmp_path):
    steps = {}
    for stage in range(4):
        trainer = trainer_of(tiny_model, tmp_path, pairs(), zero_stage=stage)
        steps[stage] = [trainer.step(index, 9, [0, 1, 2, 3]) for index in range(3)]
    for name in ("loss", "grad_norm"):
        for stage in (1, 2, 3):
            assert [s[name] for s in steps[stage]] == pytest.approx([s[name] for s in steps[0]], rel=1e-4)
    assert steps[0][2]["loss"] < steps[0][0]["loss"]


def test_small_micro_batches_give_the_large_batch(tiny_model, tmp_path):
    losses = []
    for budget in (128, 1024):
        data = pairs()
        data = PairTable(data.table, [PairSize(30, 20, 10)] * PAIRS if budget == 128 else data.sizes)
        trainer = trainer_of(tiny_model, tmp_path, data, zero_stage=1, tokens_per_batch=budget)
        losses.append([trainer.step(index, 9, [0, 1, 2, 3])["loss"] for index in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_adapter_trains_over_weights_in_four_bits(tiny_model, tmp_path):
    lora = {"rank": 4}
    plain, four = (
        trainer_of(tiny_model, tmp_path, pairs(), quantization=name, zero_stage=1, lora=lora)
        for name in ("none", "nf4")
    )
    expected = plain.step(0, 9, [0, 1, 2, 3])["logps/chosen"]
    first = four.step(0, 9, [0, 1, 2, 3])
    assert first["logps/chosen"] != expected
    assert first["logps/chosen"] == pytest.approx(expected, rel=0.02)
    layer = four.engine.module.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == torch.uint8
    steps = [four.step(index, 9, [0, 1, 2, 3]) for index in range(1, 9)]
    assert steps[-1]["loss"] < first["loss"]


def test_quantised_weights_are_not_partitioned(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"give training.lora, and training.zero_stage 2 or lower"):
        trainer_of(tiny_model, tmp_path, pairs(), quantization="nf4", zero_stage=3, lora={"rank": 4})
