"""How much likelier a trained model finds an answer than the model it was trained from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdpo.modeling.chat import Chat
from rdpo.modeling.loading import learned_positions
from rdpo.modeling.packing import PairSize, micro_batches
from rdpo.records import Row

if TYPE_CHECKING:
    from rdpo.modeling.model import Policy


@dataclass(frozen=True)
class LogRatio:
    """log pi(y|x) - log ref(y|x) of one answer in nats, and its tokens; NaN where the models cannot read it."""

    nats: float = math.nan
    tokens: int = 0


@dataclass(frozen=True)
class Ratios:
    """Two models that read the same tokens, on one device, with a token budget for one forward."""

    chat: Chat
    trained: Policy
    start: Policy
    device: str
    budget: int

    def __call__(self, rows: Sequence[Row], column: str) -> list[LogRatio]:
        """The log-ratios of the answers in `column`, which has its `_finish_reason` beside it.

        Where the tokens that were drawn are known (`_ids`), these are read: text may be read as other tokens.
        """
        prompts = [self._prompt_ids(row) for row in rows]
        answers = [self._answer_ids(row, column) for row in rows]
        # A pair without a second answer, so that the same plan of micro-batches serves.
        sizes = [PairSize(len(prompt), len(answer), 0) for prompt, answer in zip(prompts, answers, strict=True)]

        vocabulary, limit = self.trained.config.vocab_size, learned_positions(self.trained.causal)
        whole = [
            index
            for index, size in enumerate(sizes)
            if size.prompt and size.chosen and (limit is None or size.longest <= limit)
            if max(*prompts[index], *answers[index]) < vocabulary
        ]

        ratios = [LogRatio()] * len(rows)
        for micro in micro_batches(whole, sizes, self.budget, self.trained.packed):
            nats_of = self._forward(
                [prompts[index] for index in micro.pairs], [answers[index] for index in micro.pairs]
            )
            for index, nats in zip(micro.pairs, nats_of, strict=True):
                ratios[index] = LogRatio(nats, sizes[index].chosen)
        return ratios

    def _answer_ids(self, row: Row, column: str) -> list[int]:
        drawn: list[int] | None = row.get(f"{column}_ids")
        return drawn or self.chat.completion_ids(row[column], row[f"{column}_finish_reason"] == "stop")

    def _prompt_ids(self, row: Row) -> list[int]:
        """Ids of the prompt; none if the template refuses it."""
        try:
            return self.chat.prompt_ids(row["prompt"])
        except ValueError:
            return []

    def _forward(self, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
        import torch

        with torch.inference_mode():
            after, before = (
                policy(policy.batch(prompts, answers).to(self.device)) for policy in (self.trained, self.start)
            )
        ratios: list[float] = (after - before).tolist()
        return ratios
