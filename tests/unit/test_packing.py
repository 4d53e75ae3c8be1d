"""Plans and layouts: nothing lost, nothing twice, equal work for all workers."""

import random

import pytest
import torch

from rdpo.policy.packing import collate, collate_pairs, epoch_order, epoch_steps, plan_step


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(8))
def test_plan_gives_every_pair_once_and_every_worker_as_many_forwards(workers, seed):
    draw = random.Random(seed)
    lengths = [draw.randint(5, 200) for _ in range(40)]
    pairs = draw.sample(range(40), draw.randint(workers, 32))
    plan = plan_step(pairs, lengths, workers, budget=800)
    assert len({len(share) for share in plan}) == 1
    counted = [pair for share in plan for micro in share if not micro.idle for pair in micro.pairs]
    assert sorted(counted) == sorted(pairs)
    for share in plan:
        for micro in share:
            assert micro.pairs
            assert 2 * len(micro.pairs) * max(lengths[pair] for pair in micro.pairs) <= 800


def test_plan_balances_tokens():
    lengths = [100, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10]
    plan = plan_step(range(11), lengths, 2, budget=10_000)
    loads = [sum(lengths[pair] for micro in share for pair in micro.pairs) for share in plan]
    assert loads == [100, 100]


def test_epoch_order_depends_on_seed_and_epoch_alone():
    assert epoch_order(50, 3, 1) == epoch_order(50, 3, 1)
    assert epoch_order(50, 3, 1) != epoch_order(50, 3, 2)
    assert sorted(epoch_order(50, 3, 1)) == list(range(50))


def test_epoch_leaves_out_only_a_batch_too_small_for_the_workers():
    assert epoch_steps(9, 4, 2) == 2
    assert epoch_steps(10, 4, 2) == 3


def test_collate_points_at_the_states_that_predict_completions():
    batch = collate([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]])
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 6], [4, 7, 8, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.predict_at.tolist() == [2, 3, 5, 6, 7]
    assert batch.labels.tolist() == [5, 6, 7, 8, 9]
    assert batch.sequence.tolist() == [0, 0, 1, 1, 1]
    shifted = batch.input_ids.flatten()[batch.predict_at + 1]
    assert torch.equal(shifted, batch.labels)


def test_pairs_are_all_chosen_then_all_rejected():
    batch = collate_pairs([[1], [2]], [[3], [4]], [[5, 6], [7]])
    assert batch.input_ids[:, 1].tolist() == [3, 4, 5, 7]
    assert batch.lengths.tolist() == [1, 1, 2, 1]
