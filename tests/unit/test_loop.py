"""The training loop on an engine of plain torch: what a step does, whatever engine takes it. No DeepSpeed."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from rdpo.modeling.packing import PairSize
from rdpo.training.checkpoint import Saved, export_policy, is_whole, restore_checkpoint, write_checksums
from tests.support.pairs import PAIRS, check_steps_that_are_not_finite, pairs, trainer_of, weights
from tests.support.plain_backend import PlainBackend

pytestmark = pytest.mark.usefixtures("process_group", "one_thread")


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for each other take longer than what they compute of so small a model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain(model, place, data=None, **settings):
    return trainer_of(model, place, data or pairs(), PlainBackend, **settings)


def losses(trainer, indices):
    return [trainer.step(index, 9, [0, 1, 2, 3])["loss"] for index in indices]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_that_is_not_finite_is_left_out_and_the_next_one_taken(tiny_model, tmp_path, dtype):
    trainer = plain(tiny_model, tmp_path, pairs(poisoned=[2]), dtype=dtype, max_skipped_steps=1)
    check_steps_that_are_not_finite(trainer)


def test_a_skipped_step_leaves_no_trace_in_the_next(tiny_model, tmp_path):
    """The gradient of the finite pairs of a skipped step is not carried over."""
    histories = []
    for bad_first in (True, False):
        trainer = plain(tiny_model, tmp_path, pairs(poisoned=[2]), max_skipped_steps=1)
        if bad_first:
            trainer.step(0, 9, [0, 2])
        histories.append([trainer.step(0, 9, [0, 1])["loss"], trainer.step(1, 9, [1, 3])["loss"]])
    assert histories[0] == histories[1]


def test_small_micro_batches_give_the_large_batch(tiny_model, tmp_path):
    large = plain(tiny_model, tmp_path)
    # Sizes that fill the budget with two pairs, though the tokens stay the same.
    small = plain(tiny_model, tmp_path, replace(pairs(), sizes=[PairSize(30, 20, 10)] * PAIRS), tokens_per_batch=128)
    assert losses(small, range(3)) == pytest.approx(losses(large, range(3)), rel=1e-5)


def test_the_rate_of_a_step_is_the_schedules(tiny_model, tmp_path):
    trainer = plain(tiny_model, tmp_path, schedule="linear", learning_rate=1e-2)
    rates = [trainer.step(index, 4, [0, 1])["learning_rate"] for index in range(4)]
    assert rates == sorted(rates, reverse=True)
    assert trainer.engine.optimizer.param_groups[0]["lr"] == rates[-1] < rates[0]


def wpo_of(policy, row):
    """WPO's loss of a pair and its weight, from whole logits and a softmax."""
    ratios, logs = [], []
    for side in ("chosen", "rejected"):
        ids, answer = [*row["prompt_ids"], *row[f"{side}_ids"]], torch.tensor(row[f"{side}_ids"])
        shares = torch.softmax(policy.causal(torch.tensor([ids])).logits[0].double(), -1)
        shares = shares[len(row["prompt_ids"]) - 1 : -1]
        own = shares.gather(1, answer[:, None])[:, 0].log()
        ratios.append(own.sum() - row[f"reference_{side}_logps"])
        logs.append((own - shares.square().sum(-1).log()).mean())
    weight = torch.exp(sum(logs)).clamp_max(1.0).detach()
    return -weight * torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1]) - row["reward_gap"]), weight


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("budget", [128, 1024])
def test_wpo_weighs_pairs_by_the_policy_of_each_step(tiny_model, tmp_path, layout, budget):
    data = replace(pairs(), sizes=[PairSize(30, 20, 10)] * PAIRS) if budget == 128 else pairs()
    settings = {"policy_weight": "wpo", "layout": layout, "tokens_per_batch": budget, "max_grad_norm": 1e9}
    trainer = plain(tiny_model, tmp_path, data, **settings)
    reader = plain(tiny_model, tmp_path, layout="padded").policy
    rows = data.table.to_pylist()
    weights_seen = []
    for index in range(3):
        reader.load_state_dict(trainer.policy.state_dict())
        found = [wpo_of(reader, row) for row in rows]
        expected = sum(loss for loss, _ in found) / PAIRS
        gradients = torch.autograd.grad(expected, list(reader.parameters()))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()

        step = trainer.step(index, 9, [0, 1, 2, 3])
        assert step["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert step["weights/mean"] == pytest.approx(sum(weight.item() for _, weight in found) / PAIRS, rel=1e-5)
        weights_seen += [weight.item() for _, weight in found]
    # Of both kinds: those that the bound cuts, and those that it does not.
    assert min(weights_seen) < 0.9 and max(weights_seen) == 1


def test_without_wpo_nothing_is_weighed(tiny_model, tmp_path):
    step = plain(tiny_model, tmp_path).step(0, 9, [0, 1, 2, 3])
    assert "weights/mean" not in step


def test_held_out_pairs_are_measured_without_dropout_and_change_nothing(tiny_model, tmp_path):
    lora = {"rank": 4, "dropout": 0.5}
    histories = []
    for measured in (False, True):
        trainer, history = plain(tiny_model, tmp_path, lora=lora), []
        for index in range(3):
            history += losses(trainer, [index])
            if measured:
                once, twice = (trainer.margins(pairs(count=6)) for _ in range(2))
                assert once == twice
                assert [row["prompt_id"] for row in once] == [f"p{number}" for number in range(6)]
        histories.append(history)
    assert histories[0] == histories[1]


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_checkpoint_resumes_as_if_nothing_had_happened(tiny_model, tmp_path, lora):
    trainer = plain(tiny_model, tmp_path, lora=lora)
    history = [trainer.step(index, 9, [0, 1, 2, 3]) for index in range(2)]
    trainer.engine.save(tmp_path, {"history": history})
    expected = losses(trainer, [2, 3])
    resumed = plain(tiny_model, tmp_path, lora=lora)
    assert restore_checkpoint(resumed.engine, Saved(tmp_path)) == history
    assert losses(resumed, [2, 3]) == expected
    assert restore_checkpoint(resumed.engine, None) == []


def test_a_checkpoint_with_a_damaged_file_is_not_whole(tiny_model, tmp_path):
    plain(tiny_model, tmp_path).engine.save(tmp_path, {"history": []})
    assert not is_whole(tmp_path)
    write_checksums(tmp_path)
    assert "plain.pt" in json.loads((tmp_path / "checksums-0.json").read_text())
    assert is_whole(tmp_path)
    content = bytearray((tmp_path / "plain.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "plain.pt").write_bytes(content)
    assert not is_whole(tmp_path)


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_what_leaves_training_is_what_was_trained(tiny_model, tmp_path, lora):
    trainer = plain(tiny_model, tmp_path, lora=lora)
    losses(trainer, [0])
    export_policy(trainer.engine, tmp_path / "policy")
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    left = load_file(tmp_path / "policy" / file)
    # safetensors leaves out the name of peft's one adapter, and the second name of a tied weight.
    trained = {name.replace(".default", ""): tensor for name, tensor in weights(trainer).items()}
    assert left.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in left.items())
