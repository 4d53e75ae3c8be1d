"""A language model as judge: it rates each answer by a rubric, or compares two at a time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from itertools import permutations
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rdpo.cluster.pools import Pool, engine_pool
from rdpo.config import Job, JudgeReward, Sampling
from rdpo.files.manifest import Settings
from rdpo.modeling.chat import Chat, load_chat, rendering_settings
from rdpo.modeling.weights import ModelRef
from rdpo.preference.ratings import (
    LEAST_SHARE,
    check_rubric,
    expected_rating,
    rating_share,
    rating_value,
    rating_values,
    written_rating,
)
from rdpo.preference.rewards.kind import RewardKind
from rdpo.preference.scores import with_scores
from rdpo.records import ID_COLUMN, Row, draw_seed, table_of, text_of
from rdpo.synthesis.crashes import CrashGuard, open_crash_counts
from rdpo.synthesis.engine import Engine, Generation, engine_settings
from rdpo.synthesis.instructions import render

if TYPE_CHECKING:
    import ray.data
    from ray.actor import ActorHandle


class JudgeKind(RewardKind[JudgeReward]):
    """A pool of engines with a model that judges."""

    seeded = True

    def check_named(self, job: Job) -> None:
        """Look at the names that the rubric uses.

        Raises:
            InputError: it is no template, or uses another name.
        """
        check_rubric(self.reward)

    def check(self, job: Job) -> None:
        """Load the judge's chat, and find the tokens of its ratings.

        Raises:
            InputError: the model has no chat, or a rating is not one token.
        """
        chat = judge_chat(self.reward, job)
        if self.reward.score == "expected":
            rating_values(chat, self.reward)

    def settings(self, job: Job) -> Settings:
        """Its fields, and the judge's weights."""
        model = ModelRef.of(job, self.reward.model)
        rendering = rendering_settings(judge_chat(self.reward, job), reasons_first(self.reward))
        drawn = self.reward.score == "written" and self.reward.sampling.temperature > 0
        return {
            **self.reward.model_dump(),
            "weights": model.fingerprint(),
            **rendering,
            "engine": engine_settings(self.reward.engine, model),
            **({"judge_seed": job.seed} if drawn else {}),
        }

    def pools(self, job: Job) -> list[Pool]:
        """One pool of engines."""
        return [self._pool(job)]

    def score(self, rows: ray.data.Dataset, job: Job, answers: list[str]) -> ray.data.Dataset:
        """Score by the judge's ratings."""
        arguments = {"reward": self.reward, "answers": answers, "job": job}
        return self._pool(job).map(rows, Judge, **arguments, crash_counts=open_crash_counts())

    def needs_trial(self, job: Job) -> bool:
        """Not where the judge is the model that writes the answers, which is loaded anyway."""
        teacher = None if job.synthesis.endpoint else job.synthesis.teacher or job.student.model
        return (self.reward.model or job.student.model) != teacher

    def _pool(self, job: Job) -> Pool:
        nodes, judge = job.cluster.placement.reward, ModelRef.of(job, self.reward.model)
        return engine_pool("rewards", f"{self.where}.engine", self.reward.engine, nodes, judge)


class Judge:
    """A Ray Data actor with a vLLM engine whose model judges answers.

    The score of an answer is the expected rating (the rating tokens' probabilities, made to sum to one, times their
    values), the mean of the ratings that the judge writes down (`score = "written"`), or, with `pairwise`, the mean
    probability to be preferred to the row's other answers, over both orders in which they can be shown.
    """

    def __init__(self, reward: JudgeReward, answers: list[str], job: Job, crash_counts: ActorHandle):
        self.reward, self.answers, self.job, self.crash_guard = reward, answers, job, CrashGuard(crash_counts)
        self.chat = judge_chat(reward, job)
        self.values = {} if reward.score == "written" else rating_values(self.chat, reward)
        self.engine = Engine(str(ModelRef.of(job, reward.model).folder()), reward.engine, job.seed)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Judge a block of rows."""
        yield table_of(await self.crash_guard.carry(batch.to_pylist(), self.judged))

    async def judged(self, row: Row) -> Row:
        """One row with the scores of its answers; a question that cannot be put drops it."""
        return await with_scores(row, self.answers, self.reward.name, self._scores(row))

    async def _scores(self, row: Row) -> list[float]:
        if self.reward.pairwise:
            return await self._preferences(row)
        return list(await asyncio.gather(*[self._rated(row, answer) for answer in self.answers]))

    async def _rated(self, row: Row, answer: str) -> float:
        asked = {"prompt": text_of(row["prompt"]), "answer": row[answer]}
        if self.reward.score == "expected":
            return await self._expected(asked, row, answer)
        votes = [self._written(asked, row, f"{answer}:{vote}") for vote in range(self.reward.votes)]
        given = [vote for vote in await asyncio.gather(*votes) if math.isfinite(vote)]
        return fmean(given) if given else math.nan

    async def _preferences(self, row: Row) -> list[float]:
        """How often each answer is preferred to the others; each pair is shown once in each order."""
        orders = list(permutations(self.answers, 2))
        answered = await asyncio.gather(*[self._first_wins(row, *order) for order in orders])
        wins: dict[str, list[float]] = {answer: [] for answer in self.answers}
        for (first, second), first_wins in zip(orders, answered, strict=True):
            wins[first].append(first_wins)
            wins[second].append(1.0 - first_wins)
        return [fmean(wins[answer]) for answer in self.answers]

    async def _first_wins(self, row: Row, first: str, second: str) -> float:
        asked = {"prompt": text_of(row["prompt"]), "first": row[first], "second": row[second]}
        return await self._expected(asked, row, f"{first}:{second}")

    async def _expected(self, asked: dict[str, str], row: Row, role: str) -> float:
        ids = list(self.values)
        # What is read are the probabilities of that token, not the token.
        one = Sampling(temperature=0.0, top_p=1.0, max_tokens=1)
        reply = await self._reply(asked, row, role, one, (), logprobs=len(ids), logprob_token_ids=ids)
        logprobs = reply.logprobs or {}
        share = rating_share(self.values, logprobs)
        if share < LEAST_SHARE:
            raise ValueError(f"the judge's ratings have {share:.2g} of its next token's probability together")
        return expected_rating(self.values, logprobs)

    async def _written(self, asked: dict[str, str], row: Row, role: str) -> float:
        reply = await self._reply(asked, row, role, self.reward.sampling, self.chat.stop_ids)
        scale = [rating_value(rating, position) for position, rating in enumerate(self.reward.ratings)]
        return written_rating(reply.text, min(scale), max(scale))

    async def _reply(
        self, asked: dict[str, str], row: Row, role: str, sampling: Sampling, stop_ids: tuple[int, ...], **extra: Any
    ) -> Generation:
        question = [{"role": "user", "content": render(self.reward.rubric, asked)}]
        seed = draw_seed(self.job.seed, row[ID_COLUMN], f"{self.reward.name}:{role}")
        if reasons_first(self.reward):
            # A model that thinks may do so here: only the rating that it comes to is read.
            prompt_ids = self.chat.asking_ids(question)
        else:
            prompt_ids = self.chat.prompt_ids(question, self.reward.prefill)
        return await self.engine.generate(prompt_ids, sampling, seed, stop_ids, **extra)

    def __del__(self) -> None:
        # Ray ends an actor without another word; the processes of its engine would outlive it.
        if hasattr(self, "engine"):
            self.engine.shutdown()


def reasons_first(reward: JudgeReward) -> bool:
    """Whether the judge is asked so that it may think, as its chat template has it, before it writes the rating."""
    return reward.score == "written" and not reward.prefill


def judge_chat(reward: JudgeReward, job: Job) -> Chat:
    """The judge's chat.

    Raises:
        InputError: the model has none that the judge can be asked with.
    """
    return load_chat(ModelRef.of(job, reward.model), job.date, reasons_first(reward))
