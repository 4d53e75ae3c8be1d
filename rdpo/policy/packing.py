"""Which pairs go into which forward, and how a forward's sequences are laid out.

The plan of an optimizer step is a pure function of the pairs' lengths, the number of workers and
the token budget, so that every worker knows every worker's share: all make the same number of
forwards, which ZeRO-3 needs, and none waits for a message to know it. The order of an epoch is a
function of (seed, epoch) alone, so that a run can stop and go on with another number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Tokens = Sequence[int]


@dataclass(frozen=True)
class MicroBatch:
    """Pairs of one forward; an idle one repeats a pair with weight 0 so that the workers stay in step."""

    pairs: tuple[int, ...]
    idle: bool = False


@dataclass(frozen=True)
class Batch:
    """S sequences as one forward reads them.

    `input_ids` and `attention_mask` are (S, T). Completion token c of all C has its hidden state at
    `predict_at[c]` of the flattened (S * T), its id in `labels[c]`, and belongs to `sequence[c]`.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    predict_at: torch.Tensor
    labels: torch.Tensor
    sequence: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: str | torch.device) -> Batch:
        """The batch on another device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def epoch_order(num_pairs: int, seed: int, epoch: int) -> list[int]:
    """A permutation of the pairs that depends on (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_pairs).tolist()


def epoch_steps(num_pairs: int, batch_size: int, num_workers: int) -> int:
    """Optimizer steps of an epoch; a last batch too small to give each worker a pair is left out."""
    full, rest = divmod(num_pairs, batch_size)
    return full + (rest >= num_workers)


def plan_step(pairs: Sequence[int], lengths: Sequence[int], num_workers: int, budget: int) -> list[list[MicroBatch]]:
    """Micro-batches of each worker for one optimizer step; every worker has equally many.

    Args:
        pairs: indices of the step's pairs.
        lengths: tokens of the longer sequence of every pair, by index.
        num_workers: workers that share the step.
        budget: most tokens of one forward, padding included (both sequences of each pair).
    """
    shares = [micro_batches(share, lengths, budget) for share in split_evenly(pairs, lengths, num_workers)]
    most = max(len(share) for share in shares)
    return [_extend(share, most) for share in shares]


def split_evenly(pairs: Sequence[int], lengths: Sequence[int], num_workers: int) -> list[list[int]]:
    """Deal pairs to workers, longest first, each to the worker with the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(num_workers)]
    load = [0] * num_workers
    for pair in sorted(pairs, key=lambda pair: (-lengths[pair], pair)):
        worker = min(range(num_workers), key=lambda worker: (load[worker], len(shares[worker]), worker))
        shares[worker].append(pair)
        load[worker] += lengths[pair]
    return shares


def micro_batches(pairs: Sequence[int], lengths: Sequence[int], budget: int) -> list[MicroBatch]:
    """Pairs, longest first, in groups whose padded size stays within the budget; a pair is never split."""
    groups: list[list[int]] = []
    for pair in sorted(pairs, key=lambda pair: (-lengths[pair], pair)):
        fits = groups and 2 * lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget
        if fits:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return [MicroBatch(tuple(group)) for group in groups]


def _extend(batches: list[MicroBatch], count: int) -> list[MicroBatch]:
    """Split micro-batches, then add idle ones, until there are `count`."""
    batches = list(batches)
    while len(batches) < count:
        largest = max(range(len(batches)), key=lambda index: len(batches[index].pairs))
        pairs = batches[largest].pairs
        if len(pairs) == 1:
            batches.append(MicroBatch(batches[-1].pairs, idle=True))
        else:
            half = len(pairs) // 2
            batches[largest : largest + 1] = [MicroBatch(pairs[:half]), MicroBatch(pairs[half:])]
    return batches


def collate(prompts: Sequence[Tokens], completions: Sequence[Tokens]) -> Batch:
    """Lay sequences out as rows of a right-padded batch (the reference layout).

    Args:
        prompts: S lists of token ids, none empty.
        completions: S lists of token ids, none empty.
    """
    import torch

    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(completion) for completion in completions])
    starts = torch.tensor([index * width + len(prompt) - 1 for index, prompt in enumerate(prompts)])
    sequence = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    within = torch.arange(len(sequence)) - (torch.cumsum(lengths, 0) - lengths)[sequence]
    return Batch(
        input_ids=input_ids,
        attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        predict_at=starts[sequence] + within,
        labels=torch.tensor([token for completion in completions for token in completion]),
        sequence=sequence,
        lengths=lengths,
    )


def collate_pairs(prompts: Sequence[Tokens], chosen: Sequence[Tokens], rejected: Sequence[Tokens]) -> Batch:
    """P pairs as S = 2P sequences: all chosen, then all rejected."""
    return collate([*prompts, *prompts], [*chosen, *rejected])
