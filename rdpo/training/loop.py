"""What one training process does: its share of every optimizer step, with or without Ray.

In: the rows of the reference stage. All workers hold the same plan (see `rdpo.modeling.packing`), so
they make equally many forwards. The loss of a step is the mean over all its pairs, whatever the
number of workers and micro-batches: each micro-batch is scaled by workers / pairs of the step, and
the engine averages over the workers. Rows may have weights (`rdpo.training.row_weights`). What the
loop needs of an engine is `rdpo.training.backend.Backend`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from rdpo.cluster.hardware import peak_flops, peak_memory_gib
from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.files.stage_folder import StageFolder
from rdpo.modeling.flops import Arithmetic
from rdpo.modeling.packing import MicroBatch, PairSize, epoch_order, epoch_steps, plan_step
from rdpo.records import HELDOUT, ID_COLUMN, SIDES, Row
from rdpo.training.backend import Backend, backend_of
from rdpo.training.gaps import GapScale
from rdpo.training.group_losses import GROUP_LOSSES, GroupLogps, Ranks, group_loss, order_kept
from rdpo.training.losses import PairLogps, implicit_rewards, policy_weight, preference_loss, reward_terms
from rdpo.training.metrics import OF_GROUPS, OF_WEIGHTS, MetricSums, PairOutcome
from rdpo.training.row_weights import SETTING, WEIGHT, RowWeights, read_weights
from rdpo.training.schedule import learning_rate

COLUMNS = [
    ID_COLUMN,
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "reference_chosen_logps",
    "reference_rejected_logps",
    "reward_gap",
]
OF_OTHERS = ["others_ids", "reference_others_logps", "gap_others"]
"""The columns of groups: of the answers between the chosen and the rejected one, in the order of preference."""


class NonFiniteStep(RuntimeError):
    """A loss or gradient is not finite; the message names the rows of the batch."""


@dataclass(frozen=True)
class PairTable:
    """The training pairs in a fixed order (by id), whatever parts they were stored in."""

    table: pa.Table
    sizes: list[PairSize]

    @classmethod
    def load(cls, run_dir: str, heldout: bool = False) -> PairTable:
        """The pairs of a run's reference stage: those to train on, or those that are held out."""
        folder = StageFolder(run_dir, "reference")
        if not folder.parts():
            reasons = [f"{count}: {reason}" for reason, count in folder.reasons().items()]
            raise InputError(f"reference: no pair is left to train on; dropped {'; '.join(reasons) or 'none'}")
        rows = folder.table(columns=[*COLUMNS, HELDOUT], optional=OF_OTHERS)
        return cls.of(rows.filter(pc.equal(pc.fill_null(rows[HELDOUT], False), heldout)))

    @classmethod
    def of(cls, rows: pa.Table) -> PairTable:
        """The rows of a reference stage, in any order."""
        # Parts are stored in the order in which actors finished them; what a step trains on must not depend on that.
        grouped = [name for name in OF_OTHERS if name in rows.column_names]
        table = rows.select([*COLUMNS, *grouped]).sort_by(ID_COLUMN).combine_chunks()
        lengths = [pa.compute.list_value_length(table[name]).to_pylist() for name in COLUMNS[1:4]]
        ids = table[OF_OTHERS[0]].to_pylist() if grouped else [None] * len(table)
        others = [tuple(map(len, answers or ())) for answers in ids]
        sizes = zip(*lengths, others, strict=True)
        return cls(table, [PairSize(prompt, chosen, rejected, more) for prompt, chosen, rejected, more in sizes])

    @classmethod
    def weighted(cls, run_dir: str, job: Job) -> PairTable:
        """The pairs that a job trains on, with the weights that it gives them, if it does.

        Raises:
            InputError: there is none, or a pair has no weight.
        """
        data, source = cls.load(run_dir), job.training.row_weights
        return data.with_weights(read_weights(source)) if source else data

    def with_weights(self, weights: RowWeights) -> PairTable:
        """The same pairs, each with a weight; other ids among the weights are of no account.

        Raises:
            InputError: a pair has none.
        """
        ids: list[str] = self.table[ID_COLUMN].to_pylist()
        if missing := next((name for name in ids if name not in weights), None):
            raise InputError(f"{SETTING}: no weight for the row {missing}; each row that is trained on needs one")
        column = pa.array([weights[name] for name in ids], pa.float64())
        return PairTable(self.table.append_column(WEIGHT, column), self.sizes)

    def without_weights(self) -> PairTable:
        """The same pairs, all of which count alike."""
        columns = [name for name in self.table.column_names if name != WEIGHT]
        return PairTable(self.table.select(columns), self.sizes)

    @property
    def has_groups(self) -> bool:
        """Whether some row has more than two answers."""
        return any(size.others for size in self.sizes)

    @property
    def gaps(self) -> list[float]:
        """How much lower than the chosen answer's the score of each other answer is, of all rows."""
        found: list[float] = self.table["reward_gap"].to_pylist()
        if OF_OTHERS[2] in self.table.column_names:
            found += chain.from_iterable(gaps or () for gaps in self.table[OF_OTHERS[2]].to_pylist())
        return found

    def with_gaps_of_others(self, seed: int) -> PairTable:
        """The pairs, each with the reward gap of another one, as the seed draws it: all gaps are there, elsewhere."""
        # A cycle through all pairs in a drawn order: nobody keeps its own.
        order = np.random.default_rng([seed, len(self)]).permutation(len(self))
        taken = np.empty_like(order)
        taken[order] = np.roll(order, 1)
        place = self.table.column_names.index("reward_gap")
        gaps = self.table["reward_gap"].take(pa.array(taken))
        return PairTable(self.table.set_column(place, "reward_gap", gaps), self.sizes)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def rows(self, pairs: tuple[int, ...]) -> dict[str, list[Any]]:
        """The columns of some pairs."""
        columns: dict[str, list[Any]] = self.table.take(list(pairs)).to_pydict()
        return columns


def step_pairs(num_pairs: int, job: Job) -> Iterator[list[int]]:
    """The pairs of every optimizer step, in order."""
    size = job.training.batch_size
    for epoch in range(job.training.epochs):
        order = epoch_order(num_pairs, job.seed, epoch)
        for step in range(epoch_steps(num_pairs, size)):
            yield order[step * size : (step + 1) * size]


class Trainer:
    """One worker's engine and data, and how many steps were left out so far."""

    def __init__(
        self,
        job: Job,
        data: PairTable,
        device: torch.device,
        converted: bool = False,
        backend: type[Backend] | None = None,
    ):
        """Build the engine.

        Args:
            job: what is trained, and how.
            data: the pairs to train on, the same on all workers.
            device: this worker's.
            converted: the engine will load a checkpoint of another number of workers.
            backend: the class of the engine; by default the one that ships.
        """
        data = data.with_gaps_of_others(job.seed) if job.training.shuffle_rewards else data
        self.job, self.data, self.device = job, data, device
        self.rank = torch.distributed.get_rank()
        self.workers = torch.distributed.get_world_size()
        # Before the student is loaded: adapters, and dropout from the first step on, draw from here.
        torch.manual_seed(job.seed)
        self.engine = (backend or backend_of(job)).build(job, device, converted)
        self.policy = self.engine.policy

        # Of all pairs, and fixed: a scale of each batch would make a loss depend on its neighbours.
        self.scale = GapScale.fitted(data.gaps, job.training.reward_norm)
        self.grouped = job.training.loss in GROUP_LOSSES or data.has_groups

        self.skipped = 0
        self.arithmetic = Arithmetic.of(self.policy)
        self.peak = peak_flops(device)

    def step(self, index: int, total: int, pairs: list[int]) -> dict[str, float]:
        """One optimizer step over the pairs of all workers; its metrics.

        Raises:
            NonFiniteStep: the loss or the gradient is not finite, once more than `max_skipped_steps` allows.
                The weights are as they were before the step.
        """
        training, began = self.job.training, time.perf_counter()
        rate = learning_rate(index, total, training.learning_rate, training.warmup_ratio, training.schedule)
        self.engine.set_lr(rate)

        sums, packed = MetricSums(self.device, *self._further_metrics()), self.policy.packed
        plan = plan_step(pairs, self.data.sizes, self.workers, training.tokens_per_batch, packed)
        share = plan[self.rank]
        for number, micro in enumerate(share, start=1):
            loss = self._micro_batch_loss(micro, self.workers / len(pairs), sums)
            self.engine.backward(loss, last=number == len(share))

        # Both are collective: every worker must come here, also one whose own loss is not finite.
        reduced = sums.reduced()
        norm = self.engine.step()
        skipped = not math.isfinite(norm)
        if skipped:
            self._skip(reduced["loss"], pairs)

        seconds = time.perf_counter() - began
        flops = self.arithmetic.flops([self.data.sizes[pair] for pair in pairs], packed) / seconds / self.workers
        return {
            "step": index + 1,
            **reduced,
            "grad_norm": norm,
            "learning_rate": rate,
            "skipped": float(skipped),
            "seconds": seconds,
            "tokens_per_second": reduced["tokens"] / seconds,
            "peak_memory_gib": peak_memory_gib(self.device),
            "tflops_per_worker": flops / 1e12,
            **({"mfu": flops / self.peak} if self.peak else {}),
        }

    def _further_metrics(self) -> list[str]:
        """Names of the metrics that only some jobs have."""
        found = list(OF_GROUPS) if self.grouped else []
        return found + list(OF_WEIGHTS) if self.policy.measures_likeness else found

    def margins(self, heldout: PairTable) -> list[Row]:
        """How far the policy prefers the chosen side of pairs it was not trained on, on every worker.

        `margin` is beta * Delta, the difference of the implicit rewards.
        """
        found = self._evaluated(heldout, lambda outcome: outcome.chosen_rewards - outcome.rejected_rewards)
        return [{ID_COLUMN: name, "margin": margin} for name, margin in found]

    def row_losses(self) -> list[Row]:
        """The `loss` of each pair that is trained on under the present weights, on every worker; no weight is in it."""
        found = self._evaluated(self.data.without_weights(), lambda outcome: outcome.loss)
        return [{ID_COLUMN: name, "loss": loss} for name, loss in found]

    def _evaluated(self, data: PairTable, pick: Callable[[PairOutcome], Tensor]) -> list[tuple[str, float]]:
        """What `pick` takes of each pair's outcome, by its id, without dropout; the same on every worker."""
        packed = self.policy.packed
        found: list[tuple[str, float]] = []
        everything = list(range(len(data)))
        plan = plan_step(everything, data.sizes, self.workers, self.job.training.tokens_per_batch, packed)

        self.engine.set_training(False)
        with torch.no_grad():
            for micro in plan[self.rank]:
                # Idle ones too: under ZeRO-3 a worker that leaves out a forward leaves the others waiting for ever.
                outcome = self.outcome(micro, data)
                if not micro.idle:
                    found.extend(zip(data.rows(micro.pairs)[ID_COLUMN], pick(outcome).tolist(), strict=True))
        self.engine.set_training(True)

        shares: list[list[tuple[str, float]]] = [[] for _ in range(self.workers)]
        torch.distributed.all_gather_object(shares, found)
        return list(chain.from_iterable(shares))

    def _skip(self, loss: float, pairs: list[int]) -> None:
        self.skipped += 1
        if self.skipped > self.job.training.max_skipped_steps:
            ids = ", ".join(self.data.rows(tuple(pairs))[ID_COLUMN])
            raise NonFiniteStep(
                f"training: loss {loss}, gradient not finite, {self.skipped - 1} steps left out before; look at these "
                f"rows, or lower training.learning_rate, or raise training.max_skipped_steps; rows of the batch: {ids}"
            )

    def _micro_batch_loss(self, micro: MicroBatch, scale: float, sums: MetricSums) -> torch.Tensor:
        """Forward of one micro-batch: its loss, scaled, as a scalar to go backward from."""
        outcome = self.outcome(micro, self.data)
        total = outcome.loss.sum()

        # An infinite loss can have a finite gradient; the step must not be taken all the same.
        spoil = torch.where(total.isfinite(), 1.0, torch.nan)
        if not micro.idle:
            sums.add(outcome, sum(self.data.sizes[pair].tokens for pair in micro.pairs))

        # An idle micro-batch counts for nothing, but the other workers wait for its collectives.
        return total * spoil * (0.0 if micro.idle else scale)

    def outcome(self, micro: MicroBatch, data: PairTable) -> PairOutcome:
        """Forward of one micro-batch: losses and what is reported."""
        training, rows = self.job.training, data.rows(micro.pairs)
        others = [ids or [] for ids in rows.get(OF_OTHERS[0], [])] if self.grouped else []
        batch = self.policy.batch(rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"], others=others)
        batch = batch.to(self.device)

        # The first answers of all pairs stand before the second ones, see `rdpo.modeling.layout`.
        forward, pairs = self.engine.forward(batch), len(micro.pairs)
        weight = None
        if self.policy.measures_likeness:
            forward, likeness = forward
            weight = policy_weight(likeness)
        chosen, rejected = forward[: 2 * pairs].chunk(2)
        lengths = batch.lengths[: 2 * pairs].chunk(2)
        references = (chosen.new_tensor(rows[f"reference_{side}_logps"]) for side in SIDES)
        logps = PairLogps(chosen, rejected, *references, *lengths, weight=weight)
        reward = reward_terms(self.scale(chosen.new_tensor(rows["reward_gap"])), training)
        group = self._group(forward, batch.lengths, rows, others) if self.grouped else None
        loss = preference_loss(logps, reward, training) if group is None else group_loss(group, training)

        return PairOutcome(
            loss=loss * loss.new_tensor(rows[WEIGHT]) if WEIGHT in rows else loss,
            sft_loss=logps.nll,
            chosen_rewards=implicit_rewards(chosen, logps.reference_chosen, training.beta),
            rejected_rewards=implicit_rewards(rejected, logps.reference_rejected, training.beta),
            chosen_logps=chosen,
            rejected_logps=rejected,
            delta=logps.delta,
            offset=reward.offset,
            order=() if group is None else order_kept(group),
            weight=() if weight is None else (weight,),
        )

    def _group(
        self, forward: Tensor, lengths: Tensor, rows: dict[str, list[Any]], others: list[list[Any]]
    ) -> GroupLogps:
        """The groups of a micro-batch, by rank, from the log-probs (S,) and lengths (S,) of its sequences."""
        pairs = len(rows["reward_gap"])
        ranks = Ranks.of([len(more) for more in others] or [0] * pairs, forward.device)
        between = [chain.from_iterable(more or () for more in rows.get(name, ())) for name in OF_OTHERS[1:]]
        known = [*chain.from_iterable(rows[f"reference_{side}_logps"] for side in SIDES), *between[0]]
        gaps = self.scale(forward.new_tensor([*[0.0] * pairs, *rows["reward_gap"], *between[1]]))
        columns = (forward, forward.new_tensor(known), lengths, gaps)
        policy, reference, sizes, lower = (column[ranks.index] for column in columns)
        return GroupLogps(policy, reference, sizes, lower, ranks.there)
