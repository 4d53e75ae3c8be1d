"""How a judge's ratings become scores, whoever asks it: an engine of its own, or a server."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from statistics import fmean
from typing import TYPE_CHECKING

import pyarrow as pa

from rdpo.config import Job, JudgeReward
from rdpo.preference.criteria import Criteria, criteria_of
from rdpo.preference.ratings import json_rating, rating_value, written_rating
from rdpo.preference.scores import Composed, Score, with_scores
from rdpo.records import ID_COLUMN, Row, draw_seed, table_of, text_of
from rdpo.synthesis.crashes import CrashGuard
from rdpo.synthesis.instructions import render

if TYPE_CHECKING:
    from ray.actor import ActorHandle


@dataclass
class Spent:
    """Tokens that a server read and wrote for one row."""

    read: int = 0
    written: int = 0


@dataclass(frozen=True)
class Question:
    """One question to the judge, the seed of its reply, and where its tokens are counted."""

    text: str
    seed: int
    spent: Spent = field(default_factory=Spent)


class Judging(ABC):
    """A Ray Data actor that has answers judged.

    The score of an answer is the expected rating (the rating tokens' probabilities, made to sum to one, times their
    values), the mean of the ratings that the judge writes down (`score = "written"` or `"json"`), or, with `pairwise`,
    the mean probability to be preferred to the row's other answers, over both orders in which they can be shown. With
    criteria it is the weighted mean of such scores, each by one of them.
    """

    def __init__(self, reward: JudgeReward, answers: list[str], job: Job, crash_counts: ActorHandle):
        self.reward, self.answers, self.job, self.crash_guard = reward, answers, job, CrashGuard(crash_counts)

    @abstractmethod
    async def expected(self, question: Question) -> float:
        """The expected rating, by the probabilities of the reply's first token.

        Raises:
            ValueError: the question cannot be put, or there is no such rating.
        """

    @abstractmethod
    async def written(self, question: Question) -> str:
        """A reply, drawn by the reward's sampling.

        Raises:
            ValueError: the question cannot be put.
        """

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Judge a block of rows."""
        yield table_of(await self.crash_guard.carry(batch.to_pylist(), self.judged))

    async def judged(self, row: Row) -> Row:
        """One row with the scores of its answers; a question that cannot be put drops it."""
        return await self.scored(row, Spent())

    async def scored(self, row: Row, spent: Spent) -> Row:
        """The same; `spent` counts the tokens of its questions."""
        return await with_scores(row, self.answers, self.reward.name, self._scores(row, spent))

    async def _scores(self, row: Row, spent: Spent) -> list[Score]:
        criteria = criteria_of(self.reward, row)
        if criteria is None:
            return list(await self._by_one(row, {}, "", spent))

        judged = [self._by_criterion(row, criteria, name, spent) for name in criteria.texts]
        by_name = dict(zip(criteria.texts, await asyncio.gather(*judged), strict=True))
        composed: list[Score] = []
        for place in range(len(self.answers)):
            scores = {name: found[place] for name, found in by_name.items()}
            composed.append(Composed(criteria.mean(scores), scores))
        return composed

    async def _by_criterion(self, row: Row, criteria: Criteria, name: str, spent: Spent) -> list[float]:
        try:
            return await self._by_one(row, {"criterion": criteria.texts[name]}, f":{name}", spent)
        except ValueError as error:
            raise ValueError(f"criterion {name}: {error}") from None

    async def _by_one(self, row: Row, also: Mapping[str, str], role: str, spent: Spent) -> list[float]:
        """Scores of the answers by one rubric; `also`: what its template knows beside prompt and answers."""
        if self.reward.pairwise:
            return await self._preferences(row, also, role, spent)
        return list(await asyncio.gather(*[self._rated(row, answer, also, role, spent) for answer in self.answers]))

    async def _rated(self, row: Row, answer: str, also: Mapping[str, str], role: str, spent: Spent) -> float:
        known = {**also, "prompt": text_of(row["prompt"]), "answer": row[answer]}
        if self.reward.score == "expected":
            return await self.expected(self._question(known, row, f"{answer}{role}", spent))
        votes = [
            self._vote(self._question(known, row, f"{answer}{role}:{vote}", spent)) for vote in range(self.reward.votes)
        ]
        given = [vote for vote in await asyncio.gather(*votes) if math.isfinite(vote)]
        return fmean(given) if given else math.nan

    async def _vote(self, question: Question) -> float:
        scale = [rating_value(rating, position) for position, rating in enumerate(self.reward.ratings)]
        read = json_rating if self.reward.score == "json" else written_rating
        return read(await self.written(question), min(scale), max(scale))

    async def _preferences(self, row: Row, also: Mapping[str, str], role: str, spent: Spent) -> list[float]:
        """How often each answer is preferred to the others; each pair is shown once in each order."""

        async def first_wins(first: str, second: str) -> float:
            known = {**also, "prompt": text_of(row["prompt"]), "first": row[first], "second": row[second]}
            return await self.expected(self._question(known, row, f"{first}:{second}{role}", spent))

        orders = list(permutations(self.answers, 2))
        answered = await asyncio.gather(*[first_wins(*order) for order in orders])
        wins: dict[str, list[float]] = {answer: [] for answer in self.answers}
        for (first, second), share in zip(orders, answered, strict=True):
            wins[first].append(share)
            wins[second].append(1.0 - share)
        return [fmean(wins[answer]) for answer in self.answers]

    def _question(self, known: Mapping[str, str], row: Row, role: str, spent: Spent) -> Question:
        seed = draw_seed(self.job.seed, row[ID_COLUMN], f"{self.reward.name}:{role}")
        return Question(render(self.reward.rubric, known), seed, spent)


def reasons_first(reward: JudgeReward) -> bool:
    """Whether the judge is asked so that it may think, as its chat template has it, before it writes the rating."""
    return reward.score == "written" and not reward.prefill
