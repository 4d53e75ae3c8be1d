"""A language model as judge: the expected rating under a rubric."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import pyarrow as pa

from rdpo.config import Job, JudgeReward, Sampling
from rdpo.errors import InputError
from rdpo.policy.chat import load_chat
from rdpo.policy.models import local_model
from rdpo.preference.scores import record_scores
from rdpo.records import Row, draw_seed, table_of, text_of
from rdpo.synthesis.engine import ContextError, Engine, gather_rows
from rdpo.synthesis.instructions import check_template, render


class Judge:
    """A Ray Data actor with a vLLM engine whose model rates answers by a rubric.

    The score is the expected rating: the rating tokens' probabilities, made to sum to one, times
    their values (the number a rating stands for, else its position).
    """

    def __init__(self, reward: JudgeReward, answers: list[str], job: Job):
        self.reward, self.answers, self.job = reward, answers, job
        model = reward.model or job.student.model
        self.chat = load_chat(model)
        self.values = rating_values(self.chat, reward)
        self.engine = Engine(str(local_model(model)), reward.engine, job.seed)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Rate a block of rows."""
        rows = batch.to_pylist()
        for answer in self.answers:
            scores = await gather_rows([self.rate(row, answer) for row in rows])
            rows = record_scores(rows, answer, self.reward.name, scores)
        yield table_of(rows)

    async def rate(self, row: Row, answer: str) -> float:
        """Expected rating of one answer; NaN if the question does not fit the judge's context."""
        question = render(self.reward.rubric, {"prompt": text_of(row["prompt"]), "answer": row[answer]})
        prompt_ids = self.chat.prompt_ids([{"role": "user", "content": question}], self.reward.prefill)
        seed = draw_seed(self.job.seed, row["prompt_id"], f"{self.reward.name}:{answer}")
        ids = list(self.values)
        try:
            rated = await self.engine.generate(
                prompt_ids,
                Sampling(temperature=0.0, top_p=1.0, max_tokens=1),
                seed,
                (),
                logprobs=len(ids),
                logprob_token_ids=ids,
            )
        except ContextError:
            return math.nan
        return expected_rating(self.values, rated.logprobs or {})

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.shutdown()


def rating_values(chat: Any, reward: JudgeReward) -> dict[int, float]:
    """Value of each rating by its token id.

    Raises:
        InputError: a rating is not one token, or the rubric is no valid template.
    """
    where = f"rewards.{reward.name}"
    unknown = check_template(reward.rubric, where) - {"prompt", "answer"}
    if unknown:
        raise InputError(f"{where}.rubric uses {', '.join(sorted(unknown))}; it may use `prompt` and `answer`")
    values = {}
    for position, rating in enumerate(reward.ratings):
        ids = chat.text_ids(rating)
        if len(ids) != 1:
            raise InputError(f"{where}.ratings: {rating!r} is {len(ids)} tokens; a rating must be one")
        number = rating.strip().lstrip("-").isdigit()
        values[ids[0]] = float(rating) if number else float(position)
    return values


def expected_rating(values: dict[int, float], logprobs: dict[int, float]) -> float:
    """Mean of the ratings' values under their probabilities, made to sum to one."""
    present = {token: math.exp(logprobs[token]) for token in values if token in logprobs}
    total = sum(present.values())
    return sum(values[token] * p for token, p in present.items()) / total if total > 0 else math.nan
