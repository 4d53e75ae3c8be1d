"""A reward model behind a server: vLLM's, or one of the user's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import SecretStr

from rdpo.cluster.pools import engine_pool
from rdpo.config import EndpointReward, Engine, Job
from rdpo.errors import InputError
from rdpo.files.manifest import Settings
from rdpo.files.unfinished import unfinished
from rdpo.messages import is_plain
from rdpo.modeling.template import date_settings
from rdpo.modeling.weights import ModelRef
from rdpo.preference.rewards.classifier_input import read_alone, served_conversations
from rdpo.preference.rewards.kind import RewardKind
from rdpo.preference.scores import finite_or_nan, with_scores
from rdpo.records import Messages, Row, table_of, text_of
from rdpo.synthesis.crashes import CrashGuard, open_crash_counts
from rdpo.synthesis.server import (
    ENDS,
    Failed,
    Server,
    Unanswered,
    check_server,
    endpoint_key,
    for_one_question,
    root_of,
    try_server,
)
from rdpo.synthesis.teacher import client_pool

if TYPE_CHECKING:
    import ray.data
    from ray.actor import ActorHandle

HELLO: Messages = [{"role": "user", "content": "Say hello."}]
HELLO_BACK = "Hello!"
ASKED = {"url", "model", "api", "answer_only", "activation", "tokenizer", "max_length"}
"""Fields beside name and weight on which a score depends; the others say how the server is asked."""


class EndpointKind(RewardKind[EndpointReward]):
    """The client of a server that scores answers."""

    def check(self, job: Job) -> None:
        """Look for the key, and at the tokenizer; ask the server one small question.

        Raises:
            InputError: one of them is missing, the tokenizer cannot be used, or the server refuses the key, the route
                or the model, or gives no score.
        """
        check_server(self.reward, self.where)
        if self.reward.tokenizer:
            served_conversations(self.where, self.reward, job.prompts.system, job.date)
        once, key = for_one_question(self.reward), endpoint_key(self.reward)

        async def ask() -> None:
            # No rows are carried, so that no crashes are counted.
            await ServedReward(once, [""], job, None, key).scores(HELLO, [HELLO_BACK])

        try_server(ask)

    def settings(self, job: Job) -> Settings:
        """What a score depends on, and the tokenizer; how the server is asked changes none."""
        reward = self.reward
        found = reward.model_dump(include={"name", "weight", "kind", *ASKED})
        if not reward.tokenizer:
            return found
        pad_id = served_conversations(self.where, reward, day=job.date)[1]
        model = ModelRef(reward.tokenizer)
        read = {"tokenizer": model.tokenizer_fingerprint(), "pad": pad_id}
        return {**found, **read, **date_settings(model, job.date)}

    def score(self, rows: ray.data.Dataset, job: Job, answers: list[str]) -> ray.data.Dataset:
        """Score by the server's numbers."""
        pool = engine_pool("rewards", self.where, client_pool(Engine(), self.reward), None)
        arguments: dict[str, Any] = {"reward": self.reward, "answers": answers, "job": job}
        # The key goes along: a worker on another machine does not have the driver's environment.
        arguments |= {"key": endpoint_key(self.reward), "crash_counts": open_crash_counts()}
        return pool.map(rows, ServedReward, **arguments)


class ServedReward:
    """A Ray Data actor that asks a server for the scores of answers."""

    def __init__(self, reward: EndpointReward, answers: list[str], job: Job, crash_counts: ActorHandle, key: SecretStr):
        self.reward, self.answers, self.crash_guard = reward, answers, CrashGuard(crash_counts)
        self.where = f"rewards.{reward.name}"
        self.url = reward.url if reward.api == "json" else f"{root_of(reward.url)}/{reward.api}"
        named = f"{self.url} of {reward.model!r}" if reward.model else self.url
        self.server = Server(reward, key, self.where, named, "`url`, `api` or `model`")
        self.read = served_conversations(self.where, reward, day=job.date) if reward.tokenizer else None
        self.first, self.begun = asyncio.Lock(), False

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Score a block of rows."""
        yield table_of(await self.crash_guard.carry(batch.to_pylist(), self.scored))

    async def scored(self, row: Row) -> Row:
        """One row with the scores of its answers; one that the server's end leaves without is unfinished."""
        try:
            scores = self.scores(row["prompt"], [row[answer] for answer in self.answers])
            return await with_scores(row, self.answers, self.reward.name, scores)
        except ENDS as error:
            return unfinished(row, error)

    async def scores(self, prompt: Messages, texts: Sequence[str]) -> list[float]:
        """Scores of the answers to a prompt, in order; NaN where the server gives no number.

        Raises:
            ValueError: the server will not score one.
            InputError: the server cannot be used.
            EndpointDown: it answers nothing any more.
        """
        if self.read is None and not is_plain(prompt):
            raise ValueError("calls of tools are not sent to a server; name its tokenizer, and they are rendered here")
        await self._begin()
        if self.reward.api == "json":
            return await self._answered(self._items(prompt, texts), len(texts))
        bodies = [self._body(prompt, text) for text in texts]
        found = await asyncio.gather(*[self._answered(body, 1) for body in bodies])
        return [score for [score] in found]

    async def _begin(self) -> None:
        """Once, before the first score: whether the server leaves out the head's activation.

        Raises:
            InputError: it gives the same with and without, and that may be a probability.
        """
        async with self.first:
            self.server.check()
            if self.begun:
                return
            if self.reward.api != "json" and not self.reward.activation:
                plain, activated = [
                    await self._answered({**self._body(HELLO, HELLO_BACK), "use_activation": wanted}, 1)
                    for wanted in (False, True)
                ]
                if plain == activated and 0 <= plain[0] <= 1:
                    raise self.server.end(
                        InputError(
                            f"{self.where}: {self.reward.url} gives {plain[0]:g} with the head's activation and "
                            "without (use_activation), so this may be a probability; set activation = true to take it "
                            "as it is, or ask a newer server of vLLM's"
                        )
                    )
            self.begun = True

    async def _answered(self, body: Settings, count: int) -> list[float]:
        harmless = self._items(HELLO, [HELLO_BACK]) if self.reward.api == "json" else self._body(HELLO, HELLO_BACK)
        return await self.server.answer(partial(self._ask, body, count), partial(self._ask, harmless, 1))

    async def _ask(self, body: Settings, count: int) -> list[float]:
        found = await self.server.send(lambda client: client.post(self.url, cast_to=object, body=body))
        if self.reward.api == "json":
            return _scores_in(found, count)
        outputs = _outputs_in(found, self.reward.api)
        if len(outputs) != 1:
            raise InputError(
                f"{self.where}: {self.url} gives {len(outputs)} numbers for an answer; a reward has one. A model of "
                'several outputs is kind = "classifier" with outputs'
            )
        return outputs

    def _body(self, prompt: Messages, answer: str) -> Settings:
        """A request to a route of vLLM's."""
        body: Settings = {"use_activation": self.reward.activation}
        if self.reward.model:
            body["model"] = self.reward.model
        if self.reward.api == "score":
            return {**body, "text_1": text_of(prompt), "text_2": answer}
        if self.reward.api == "pooling":
            body["task"] = "classify"
        if self.read:
            return {**body, "input": read_alone(*self.read, prompt, answer)}
        if self.reward.answer_only:
            return {**body, "input": answer}
        return {**body, "messages": [*prompt, {"role": "assistant", "content": answer}]}

    def _items(self, prompt: Messages, answers: Sequence[str]) -> Settings:
        """A request to a server of the user's."""
        asked = {} if self.reward.answer_only else {"prompt": prompt}
        items = [{**asked, "answer": answer} for answer in answers]
        return {**({"model": self.reward.model} if self.reward.model else {}), "items": items}


def _scores_in(reply: object, count: int) -> list[float]:
    scores = reply.get("scores") if isinstance(reply, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        raise Failed(f'the reply is not {{"scores": [...]}} with {count} numbers', broken=True)
    return [finite_or_nan(score) for score in scores]


def _outputs_in(reply: object, api: str) -> list[float]:
    """The head's outputs in the reply of a route of vLLM's."""
    field = {"classify": "probs", "pooling": "data", "score": "score"}[api]
    try:
        found = reply["data"][0][field]  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        raise Failed(f"the reply is none of /{api}", broken=True) from None
    if isinstance(found, list) and any(isinstance(value, list) for value in found):
        raise Unanswered(f"the endpoint gives a number for each token; /{api} is to give one for the conversation")
    return [finite_or_nan(value) for value in (found if isinstance(found, list) else [found])]
