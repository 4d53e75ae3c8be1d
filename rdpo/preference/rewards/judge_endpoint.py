"""A judge behind a server that speaks the OpenAI protocol.

Expected ratings need the probabilities of a reply's first token (`logprobs`). vLLM's server says the tokens of the
ratings (`/tokenize`) and gives the probability of each (`logprob_token_ids`), as an engine of rdpo's does. Others list
the likeliest tokens as texts, among which the ratings are looked for.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import SecretStr

from rdpo.config import Job, JudgeReward, Sampling
from rdpo.errors import InputError
from rdpo.files.unfinished import unfinished
from rdpo.modeling.reasoning import Unended, split_inline
from rdpo.preference.ratings import certain_rating, rating_counts
from rdpo.preference.rewards.judging import Judging, Question, Spent, reasons_first
from rdpo.preference.scores import finite_or_nan
from rdpo.records import Row
from rdpo.synthesis.endpoint import HARMLESS, Endpoint, generation, usage_of, withheld
from rdpo.synthesis.server import (
    ENDS,
    Failed,
    Refused,
    Unanswered,
    endpoint_key,
    for_one_question,
    root_of,
    try_server,
)

if TYPE_CHECKING:
    from ray.actor import ActorHandle

T = TypeVar("T")

READ, WRITTEN = "tokens_read_", "tokens_written_"
"""Columns of a row with the tokens that its questions took, before the reward's name."""
TOKEN_ID = "token_id:"
"""What a token looks like where vLLM's server names it by its id."""
VLLM = "/tokenize"
ROUNDING = 1e-3
"""How far above 0 a log-probability may be."""
ONE_TOKEN = Sampling(temperature=0.0, top_p=1.0, max_tokens=1)
"""What is read are the probabilities of that token, not the token."""


class ServedJudge(Judging):
    """The judge is a model behind a server."""

    def __init__(self, reward: JudgeReward, answers: list[str], job: Job, crash_counts: ActorHandle, key: SecretStr):
        super().__init__(reward, answers, job, crash_counts)
        if reward.endpoint is None:
            raise ValueError("a judge without an endpoint is no server's")
        self.where, self.settings = f"rewards.{reward.name}", reward.endpoint
        self.endpoint = Endpoint(reward.endpoint, key, f"{self.where}.endpoint")
        self.ids: dict[str, int] | None = None
        self.first, self.begun = asyncio.Lock(), False

    async def judged(self, row: Row) -> Row:
        """One row with its scores and the tokens they took; one that the server's end leaves without is unfinished."""
        spent = Spent()
        try:
            row = await self.scored(row, spent)
        except ENDS as error:
            return unfinished(row, error)
        return {**row, READ + self.reward.name: spent.read, WRITTEN + self.reward.name: spent.written}

    async def expected(self, question: Question) -> float:
        """The expected rating by the probabilities that the server says."""
        ids = await self._rating_ids()
        extra: dict[str, Any] = {"logprobs": True, "top_logprobs": self.reward.top_logprobs}
        if ids:
            extra |= {"logprob_token_ids": list(ids.values()), "return_tokens_as_token_ids": True}
        logprobs = await self._asked(question, ONE_TOKEN, self._logprobs, extra)

        counts = rating_counts(self.reward)
        if ids and all(token.startswith(TOKEN_ID) for token in logprobs):
            by_id = {int(token.removeprefix(TOKEN_ID)): chance for token, chance in logprobs.items()}
            return certain_rating({ids[rating]: value for rating, value in counts.items()}, by_id)
        return certain_rating(counts, logprobs)

    async def written(self, question: Question) -> str:
        """A reply of the server."""
        read = partial(generation, keyless=self.endpoint.server.keyless)
        held: dict[str, Any] = {}
        if self.reward.score == "json":
            schema = {"name": "rating", "schema": self.reward.reply_schema, "strict": True}
            held["response_format"] = {"type": "json_schema", "json_schema": schema}
        text = (await self._asked(question, self.reward.sampling, read, held)).text
        if not reasons_first(self.reward):
            return text
        try:
            return split_inline(text)[1]
        except Unended:
            return ""

    async def _asked(
        self, question: Question, sampling: Sampling, read: Callable[[Any], T], extra: Mapping[str, Any]
    ) -> T:
        def count_and_read(response: Any) -> T:
            tokens = usage_of(response)
            question.spent.read += tokens[0]
            question.spent.written += tokens[1]
            return read(response)

        messages = [{"role": "user", "content": question.text}]
        if given := self.reward.chat_template_kwargs:
            extra = {**extra, "chat_template_kwargs": given}
        return await self.endpoint.complete(
            messages, sampling, question.seed, count_and_read, self.reward.prefill, **extra
        )

    def _logprobs(self, response: Any) -> dict[str, float]:
        """Log-probabilities of the tokens that a reply may begin with, by their texts or ids."""
        withheld(response, self.endpoint.server.keyless)
        try:
            found = response.choices[0].logprobs
            first = found.content[0] if found and found.content else None
            entries = first.top_logprobs or [] if first else []
            listed = [(str(entry.token), finite_or_nan(entry.logprob)) for entry in entries]
        except (AttributeError, TypeError, LookupError):
            listed = []
        if not listed:
            raise self._without_logprobs()
        if not all(chance <= ROUNDING for _, chance in listed):
            raise Failed("log-probabilities that are none", broken=True)

        chances: dict[str, float] = {}
        for token, chance in listed:
            # Two tokens may have one text, with and without the blank before them for example.
            chances[token] = _either(chances[token], chance) if token in chances else chance
        return chances

    def _without_logprobs(self) -> Exception:
        if self.endpoint.server.answered:
            return Unanswered("the endpoint gives no probabilities with this reply")
        return InputError(
            f"{self.where}.endpoint: {self.settings.url} gives no probabilities of {self.settings.model}'s tokens "
            '(top_logprobs), which expected ratings are made of; set score = "written", or name another server'
        )

    async def _rating_ids(self) -> dict[str, int] | None:
        """Token id of each rating, where the server is vLLM's; asked for once.

        Raises:
            InputError: a rating is not one token.
        """
        async with self.first:
            self.endpoint.server.check()
            if not self.begun:
                try:
                    self.ids, self.begun = await self._find_ids(), True
                except Failed:
                    # One that answers questions alone is no server of vLLM's; others are asked again.
                    self.begun = self.endpoint.server.answered > 0
        return self.ids

    async def _find_ids(self) -> dict[str, int] | None:
        """Token id of each rating, or None of another server.

        Raises:
            InputError: a rating is not one token.
            Failed: the server does not answer now.
        """
        ids: dict[str, int] = {}
        for rating in self.reward.ratings:
            try:
                tokens = await self.endpoint.server.insist(partial(self._tokens, rating))
            except (InputError, Refused):
                # Whether it is another server, or refuses all, the first question will tell.
                return None
            if tokens is None:
                return None
            if len(tokens) != 1:
                said = f"{self.where}.ratings: {rating!r} is {len(tokens)} tokens of {self.settings.model}"
                raise self.endpoint.server.end(InputError(f"{said}; a rating must be one"))
            ids[rating] = tokens[0]
        return ids

    async def _tokens(self, text: str) -> list[int] | None:
        url = root_of(self.settings.url) + VLLM
        asked = {"model": self.settings.model, "prompt": text, "add_special_tokens": False}
        found = await self.endpoint.server.send(lambda client: client.post(url, cast_to=object, body=asked))
        tokens = found.get("tokens") if isinstance(found, dict) else None
        is_list = isinstance(tokens, list) and all(isinstance(token, int) for token in tokens)
        return tokens if is_list else None


def check_served(reward: JudgeReward, job: Job) -> None:
    """Ask the judge's server one small question, as it will be asked.

    Raises:
        InputError: it refuses the key or the model, gives no probabilities where these are needed, or does not go on
            from the `prefill`; or a rating is not one token.
    """
    if reward.endpoint is None:
        return
    # Enough for a server that takes no less.
    short = reward.sampling.model_copy(update={"max_tokens": 16})
    once = reward.model_copy(update={"endpoint": for_one_question(reward.endpoint), "sampling": short})
    key = endpoint_key(reward.endpoint)

    async def ask() -> None:
        # No rows are carried, so that no crashes are counted.
        judge = ServedJudge(once, [], job, None, key)
        question = Question(HARMLESS[0]["content"], 0)
        await (judge.expected(question) if reward.score == "expected" else judge.written(question))

    try_server(ask)


def _either(one: float, other: float) -> float:
    """Log-probability of either of two tokens."""
    return max(one, other) + math.log1p(math.exp(-abs(one - other)))
