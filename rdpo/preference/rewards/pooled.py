"""A reward model with a classification head on vLLM's engines: for one that no GPU holds, or many answers a prompt.

An engine splits every layer over its GPUs, and finds the prompt of an answer in its prefix cache once another answer to
it was read. It reads the last token's hidden state, as transformers does: the score is that of the model alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pyarrow as pa

from rdpo.config import ClassifierReward, Job
from rdpo.config import Engine as EngineSettings
from rdpo.preference.rewards.classifier_input import checked_classifier, read_alone
from rdpo.preference.scores import Score, with_scores
from rdpo.records import Row, table_of
from rdpo.synthesis.crashes import CrashGuard
from rdpo.synthesis.engine import Engine

if TYPE_CHECKING:
    from ray.actor import ActorHandle


class PooledClassifier:
    """A Ray Data actor with a vLLM engine whose model scores conversations."""

    def __init__(self, reward: ClassifierReward, answers: list[str], job: Job, crash_counts: ActorHandle):
        self.reward, self.answers, self.crash_guard = reward, answers, CrashGuard(crash_counts)
        self.checked = checked_classifier(reward, day=job.date)
        # A configuration may say two outputs where the weights have one.
        outputs = {"num_labels": self.checked.config.num_labels}
        self.engine = Engine(
            self.checked.folder, reward.engine or EngineSettings(), job.seed, runner="pooling", hf_overrides=outputs
        )

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Score a block of rows."""
        yield table_of(await self.crash_guard.carry(batch.to_pylist(), self.scored))

    async def scored(self, row: Row) -> Row:
        """One row with the scores of its answers; a conversation that cannot be read drops it."""
        scores = asyncio.gather(*[self._score(row, answer) for answer in self.answers])
        return await with_scores(row, self.answers, self.reward.name, scores)

    async def _score(self, row: Row, answer: str) -> Score:
        ids = read_alone(self.checked.conversations, self.checked.pad_id, row["prompt"], row[answer])
        return self.checked.outputs.score(await self.engine.outputs(ids))

    def __del__(self) -> None:
        # Ray ends an actor without another word; the processes of its engine would outlive it.
        if hasattr(self, "engine"):
            self.engine.shutdown()
