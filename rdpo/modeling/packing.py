"""Which pairs go into which forward.

The plan of an optimizer step is a pure function of the pairs' sizes, the number of workers and
the token budget, so that every worker knows every worker's share: all make the same number of
forwards, which ZeRO-3 needs, and none waits for a message to know it. The order of an epoch is a
function of (seed, epoch) alone, so that a run can stop and resume with another number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MicroBatch:
    """Pairs of one forward; an idle one repeats a pair with weight 0 so that the workers stay in step."""

    pairs: tuple[int, ...]
    idle: bool = False


@dataclass(frozen=True)
class PairSize:
    """Tokens of a pair's parts; of a group those of its other answers too."""

    prompt: int
    chosen: int
    rejected: int
    others: tuple[int, ...] = ()

    @property
    def answers(self) -> tuple[int, ...]:
        """Tokens of each answer."""
        return self.chosen, self.rejected, *self.others

    @property
    def longest(self) -> int:
        """Tokens of the longest of its sequences."""
        return self.prompt + max(self.answers)

    @property
    def packed(self) -> int:
        """Tokens of the pair with its prompt once."""
        return self.prompt + sum(self.answers)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, prompt included in each: the work, however it is laid out."""
        return self.packed + self.prompt * (len(self.answers) - 1)


def batch_tokens(sizes: Sequence[PairSize], packed: bool) -> int:
    """Positions of a forward over pairs: packed rows have no padding, others are as wide as the longest."""
    if packed:
        return sum(size.packed for size in sizes)
    return sum(len(size.answers) for size in sizes) * max(size.longest for size in sizes)


def epoch_order(num_pairs: int, seed: int, epoch: int) -> list[int]:
    """A permutation of the pairs that depends on (seed, epoch) alone."""
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(num_pairs).tolist()
    return order


def epoch_steps(num_pairs: int, batch_size: int) -> int:
    """Optimizer steps of an epoch, whatever the number of workers; the last one may have fewer pairs."""
    return -(-num_pairs // batch_size)


def plan_step(
    pairs: Sequence[int], sizes: Sequence[PairSize], num_workers: int, budget: int, packed: bool
) -> list[list[MicroBatch]]:
    """Micro-batches of each worker for one optimizer step; every worker has equally many.

    Args:
        pairs: indices of the step's pairs.
        sizes: sizes of all pairs, by index.
        num_workers: workers that share the step.
        budget: most positions of one forward, padding included.
        packed: whether a prompt stands once in its forward, without padding.
    """
    shares = [micro_batches(share, sizes, budget, packed) for share in split_evenly(pairs, sizes, num_workers)]
    most = max(len(share) for share in shares)

    # For a worker without pairs of its own: the shortest one, computed for nothing.
    spare = MicroBatch((min(pairs, key=lambda pair: sizes[pair].longest),), idle=True)
    return [_extend(share, most, spare) for share in shares]


def split_evenly(pairs: Sequence[int], sizes: Sequence[PairSize], num_workers: int) -> list[list[int]]:
    """Deal pairs to workers, largest first, each to the worker with the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(num_workers)]
    load = [0] * num_workers
    for pair in sorted(pairs, key=lambda pair: (-sizes[pair].packed, pair)):
        worker = min(range(num_workers), key=lambda worker: (load[worker], len(shares[worker]), worker))
        shares[worker].append(pair)
        load[worker] += sizes[pair].packed
    return shares


def micro_batches(pairs: Sequence[int], sizes: Sequence[PairSize], budget: int, packed: bool) -> list[MicroBatch]:
    """Pairs, longest first, in groups that stay within the budget; a pair is never split."""
    groups: list[list[int]] = []
    for pair in sorted(pairs, key=lambda pair: (-sizes[pair].longest, pair)):
        if groups and batch_tokens([sizes[index] for index in [*groups[-1], pair]], packed) <= budget:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return [MicroBatch(tuple(group)) for group in groups]


def _extend(batches: list[MicroBatch], count: int, spare: MicroBatch) -> list[MicroBatch]:
    """Split micro-batches, then add idle ones, until there are `count`; `spare` where a worker has no pair."""
    batches = list(batches) or [spare]
    while len(batches) < count:
        largest = max(range(len(batches)), key=lambda index: len(batches[index].pairs))
        pairs = batches[largest].pairs
        # Work that is split costs little more; an idle micro-batch is a forward and backward for nothing.
        if len(pairs) == 1:
            batches.append(MicroBatch(batches[-1].pairs, idle=True))
        else:
            half = len(pairs) // 2
            batches[largest : largest + 1] = [MicroBatch(pairs[:half]), MicroBatch(pairs[half:])]
    return batches
