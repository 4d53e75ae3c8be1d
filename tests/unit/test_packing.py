"""Plans: nothing lost, nothing twice, within the budget, equal work for all workers."""

import random

import pytest

from rdpo.modeling.packing import PairSize, batch_tokens, epoch_order, epoch_steps, plan_step


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(6))
def test_plan_gives_every_pair_once_and_every_worker_as_many_forwards(workers, seed, packed):
    draw = random.Random(seed)
    sizes = [PairSize(*(draw.randint(1, 100) for _ in range(3))) for _ in range(40)]
    pairs = draw.sample(range(40), draw.randint(1, 32))
    plan = plan_step(pairs, sizes, workers, 800, packed)
    assert len({len(share) for share in plan}) == 1
    counted = [pair for share in plan for micro in share if not micro.idle for pair in micro.pairs]
    assert sorted(counted) == sorted(pairs)
    for share in plan:
        for micro in share:
            assert micro.pairs
            assert batch_tokens([sizes[pair] for pair in micro.pairs], packed) <= 800


def test_a_forward_counts_its_padding_only_where_it_has_any():
    sizes = [PairSize(10, 5, 20), PairSize(10, 1, 2)]
    assert batch_tokens(sizes, packed=True) == 35 + 13
    assert batch_tokens(sizes, packed=False) == 2 * 2 * 30
    assert [size.tokens for size in sizes] == [45, 23]


def test_plan_balances_tokens():
    sizes = [PairSize(50, 25, 25)] + [PairSize(5, 3, 2)] * 10
    plan = plan_step(range(11), sizes, 2, 10_000, True)
    loads = [sum(sizes[pair].packed for micro in share for pair in micro.pairs) for share in plan]
    assert loads == [100, 100]


def test_epoch_order_depends_on_seed_and_epoch_alone():
    assert epoch_order(50, 3, 1) == epoch_order(50, 3, 1)
    assert epoch_order(50, 3, 1) != epoch_order(50, 3, 2)
    assert sorted(epoch_order(50, 3, 1)) == list(range(50))


def test_an_epoch_leaves_out_no_pair():
    assert [epoch_steps(pairs, 4) for pairs in (0, 1, 8, 9)] == [0, 1, 2, 3]
