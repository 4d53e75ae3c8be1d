"""DeepSpeed as the loop's engine in this process: ZeRO stages, four bits, and plain torch beside it."""

import pytest
import torch

from rdpo.modeling.packing import PairSize
from rdpo.training.loop import PairTable
from tests.support.pairs import PAIRS, check_steps_that_are_not_finite, pairs, trainer_of
from tests.support.plain_backend import PlainBackend

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def all_partitioned(monkeypatch):
    """Let ZeRO-3 partition every weight: those of the tiny model are all below its threshold."""
    monkeypatch.setattr("rdpo.training.deepspeed.PERSISTENT", 0)


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (0, "bfloat16"), (3, "bfloat16")],
)
def test_a_step_that_is_not_finite_is_left_out_and_the_next_one_taken(tiny_model, tmp_path, stage, dtype):
    data = pairs(poisoned=[2])
    trainer = trainer_of(tiny_model, tmp_path, data, dtype=dtype, zero_stage=stage, max_skipped_steps=1)
    check_steps_that_are_not_finite(trainer)


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


@pytest.mark.usefixtures("all_partitioned")
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_zero_3_and_plain_torch_give_the_same_losses(tiny_model, tmp_path, lora):
    """Ten steps with warm-up, decay and clipping."""
    common = {"lora": lora, "schedule": "linear", "warmup_ratio": 0.2, "max_grad_norm": 0.5, "learning_rate": 1e-3}
    histories = []
    for backend, stage in ((None, 3), (PlainBackend, 0)):
        trainer = trainer_of(tiny_model, tmp_path, pairs(), backend, zero_stage=stage, **common)
        histories.append([trainer.step(index, 10, [0, 1, 2, 3]) for index in range(10)])
    partitioned, plain = histories
    assert [s["loss"] for s in partitioned] == pytest.approx([s["loss"] for s in plain], abs=1e-4)
    assert [s["grad_norm"] for s in partitioned] == pytest.approx([s["grad_norm"] for s in plain], rel=1e-3)
    assert plain[-1]["loss"] < plain[0]["loss"]
    assert max(s["grad_norm"] for s in plain) > 0.5


@pytest.mark.usefixtures("all_partitioned")
def test_zero_3_weighs_pairs_as_plain_torch_does(tiny_model, tmp_path):
    histories = []
    for backend, stage in ((None, 3), (PlainBackend, 0)):
        trainer = trainer_of(tiny_model, tmp_path, pairs(), backend, zero_stage=stage, policy_weight="wpo")
        histories.append([trainer.step(index, 9, [0, 1, 2, 3]) for index in range(3)])
    for name in ("loss", "grad_norm", "weights/mean"):
        partitioned, plain = ([step[name] for step in history] for history in histories)
        assert partitioned == pytest.approx(plain, rel=1e-3)


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
    layer = four.policy.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == torch.uint8
    steps = [four.step(index, 9, [0, 1, 2, 3]) for index in range(1, 9)]
    assert steps[-1]["loss"] < first["loss"]


def test_quantised_weights_are_not_partitioned(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"give training.lora, and training.zero_stage 2 or lower"):
        trainer_of(tiny_model, tmp_path, pairs(), quantization="nf4", zero_stage=3, lora={"rank": 4})
