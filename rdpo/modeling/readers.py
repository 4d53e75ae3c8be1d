"""Log-probs of a model that is only read: the reference, a trained model, the two models of an implicit reward.

A reader is given token ids and a budget; how many processes hold the model is its own matter. `PolicyReader` holds it
in this process. `rdpo.training.sharded` has another one, whose model is partitioned over several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rdpo.modeling.masking import counted_ids, read_ids
from rdpo.modeling.packing import PairSize, micro_batches
from rdpo.modeling.weights import ModelRef, local_adapter
from rdpo.tracking.trace import span

if TYPE_CHECKING:
    from rdpo.modeling.chat import Chat
    from rdpo.modeling.layout import Batch, Tokens
    from rdpo.modeling.model import ForwardSettings, Policy
    from rdpo.modeling.probe import ReadAs
    from rdpo.records import Row


@dataclass(frozen=True)
class FrozenModel:
    """A model that is read and not trained: where its weights are, how they are held, what a message calls it."""

    ref: ModelRef
    forward: ForwardSettings
    where: str
    beside: bool = False
    """Its adapter is read beside its weights, as training has it, and not merged into them."""

    def folder(self) -> Path:
        """Where its weights are on this machine; downloads, converts or merges them if need be.

        Raises:
            InputError: the model cannot be had.
        """
        return self.ref.base.folder() if self.beside else self.ref.folder()

    def load(self) -> Policy:
        """The model with its weights, in evaluation mode; as yet its layout is believed.

        Raises:
            InputError: the model cannot be had, or not be read in the layout that is asked for.
        """
        from rdpo.modeling.model import Tuning, load_policy

        adapter = local_adapter(self.ref.adapter) if self.beside and self.ref.adapter else None
        return load_policy(self.folder(), self.forward, Tuning(adapter=adapter)).eval()

    def settle(self, policy: Policy) -> ReadAs:
        """Compare the loaded model with its own logits; from then on it is read in a layout that is exact.

        Raises:
            InputError: there is none, or it is not the one that is asked for.
        """
        from rdpo.modeling.probe import settle_layout

        read_as = settle_layout(policy, self.where, self.forward.layout)
        policy.weights = self.forward.weights
        return read_as

    def open(self, device: str) -> tuple[Policy, ReadAs]:
        """The model on a device, and the layout in which its log-probs are those of its own logits.

        Raises:
            InputError: as `load` and `settle`.
        """
        with span("model is loaded"):
            policy = self.load().to(device)
        with span("model is compared with its own logits"):
            return policy, self.settle(policy)


class Reader(Protocol):
    """A model as a function from token ids to log-probs."""

    @property
    def read_as(self) -> ReadAs:
        """The layout in which its log-probs are those of the model's own logits."""
        ...

    @property
    def vocabulary(self) -> int:
        """How many token ids it has a row for."""
        ...

    @property
    def positions(self) -> int | None:
        """Most tokens that it has positions for; None where it computes them."""
        ...

    def __call__(self, prompts: Sequence[Tokens], *answers: Sequence[Tokens]) -> list[list[float]]:
        """Summed completion log-probs in nats, (K, P), of K answers to each of P prompts."""
        ...


@dataclass(frozen=True)
class PolicyReader:
    """A reader whose model lies whole on a device of this process; `budget`: most positions of one forward."""

    policy: Policy
    read_as: ReadAs
    device: str
    budget: int

    @property
    def vocabulary(self) -> int:
        """How many token ids it has a row for."""
        rows: int = self.policy.config.vocab_size
        return rows

    @property
    def positions(self) -> int | None:
        """Most tokens that it has positions for."""
        from rdpo.modeling.loading import learned_positions

        return learned_positions(self.policy.causal)

    def __call__(self, prompts: Sequence[Tokens], *answers: Sequence[Tokens]) -> list[list[float]]:
        """Summed completion log-probs in nats, (K, P)."""
        found = [[math.nan] * len(prompts) for _ in answers]
        plan = micro_batches(range(len(prompts)), sizes_of(prompts, *answers), self.budget, self.policy.packed)
        for micro in plan:
            batch = self.policy.batch(*rows_at(micro.pairs, prompts, *answers))
            put_at(found, micro.pairs, forward(self.policy, batch.to(self.device)))
        return found


def forward(policy: Policy, batch: Batch) -> list[float]:
    """Summed log-probs (S,) of a batch's completions, without anything kept for a backward."""
    import torch

    with torch.inference_mode():
        logps: list[float] = policy(batch).tolist()
    return logps


def sizes_of(prompts: Sequence[Tokens], *answers: Sequence[Tokens]) -> list[PairSize]:
    """Sizes by which forwards are planned; a lone answer is a pair whose second answer is empty."""
    lengths = [[len(answer) for answer in column] for column in answers]
    columns = lengths if len(lengths) > 1 else [*lengths, [0] * len(prompts)]
    rows = zip(prompts, *columns, strict=True)
    return [PairSize(len(prompt), chosen, rejected, tuple(others)) for prompt, chosen, rejected, *others in rows]


def rows_at(places: Sequence[int], *columns: Sequence[Tokens]) -> list[list[Tokens]]:
    """Some rows of several columns."""
    return [[column[place] for place in places] for column in columns]


def put_at(found: list[list[float]], places: Sequence[int], logps: Sequence[float]) -> None:
    """Put the log-probs of a batch, the first answers of all its prompts before the second ones, where they belong."""
    for number, column in enumerate(found):
        part = logps[number * len(places) : (number + 1) * len(places)]
        for index, value in zip(places, part, strict=True):
            column[index] = value


UNREADABLE = "no tokens, one beyond the model's embedding, or more than the model has positions for"
"""Why an answer has no log-prob."""


@dataclass(frozen=True)
class AnswerLogp:
    """log pi(y|x) of one answer in nats, and its tokens; NaN where the model cannot read it."""

    nats: float = math.nan
    tokens: int = 0

    def __sub__(self, other: AnswerLogp) -> AnswerLogp:
        """The log-ratio of two models; NaN where one of them cannot read the answer."""
        return replace(self, nats=self.nats - other.nats)


def answer_logps(rows: Sequence[Row], column: str, chat: Chat, reader: Reader) -> list[AnswerLogp]:
    """Log-probs of the answers in `column`, which has its `_finish_reason` beside it.

    Where the tokens that were drawn are known (`_ids`), these are read: text may be read as other tokens.
    """
    prompts = [_prompt_ids(row, chat) for row in rows]
    answers = [_answer_ids(row, column, chat) for row in rows]
    read = [
        index
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        if prompt and answer and max(*prompt, *read_ids(answer)) < reader.vocabulary
        if reader.positions is None or len(prompt) + len(answer) <= reader.positions
    ]

    found = [AnswerLogp()] * len(rows)
    if read:
        [logps] = reader(*rows_at(read, prompts, answers))
        for index, nats in zip(read, logps, strict=True):
            found[index] = AnswerLogp(nats, len(counted_ids(answers[index])))
    return found


def _answer_ids(row: Row, column: str, chat: Chat) -> list[int]:
    if drawn := row.get(f"{column}_ids"):
        ids: list[int] = drawn
        return ids
    reasoning = (row.get(f"{column}_reasoning") or "") if chat.reasoning else ""
    if chat.reasoning and not reasoning:
        # Behind the place where it is asked the model would think, and not begin this answer.
        return []
    return chat.completion_ids(row[column], row[f"{column}_finish_reason"] == "stop", reasoning)


def _prompt_ids(row: Row, chat: Chat) -> list[int]:
    """Ids of the prompt; none if the template refuses it."""
    try:
        return chat.prompt_ids(row["prompt"])
    except ValueError:
        return []
