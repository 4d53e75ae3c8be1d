"""The teacher behind an OpenAI-compatible server: requests at the same time, at a rate, again where they failed.

Server errors (429, 5xx), timeouts, cut connections and answers that are not the protocol's are asked again, with
the client library's growing pauses; a request that the server refuses drops its row; a refused key or an unknown
model ends the run. Many failures in a row mean that the server is gone: the run ends, and the same command goes on.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from rdpo.config import Endpoint as EndpointSettings
from rdpo.config import Sampling
from rdpo.errors import InputError
from rdpo.records import Messages, Row
from rdpo.synthesis.engine import Generation

if TYPE_CHECKING:
    from openai import AsyncOpenAI

NO_KEY = "none"
REFUSED_KEY = (401, 403)
UNKNOWN_MODEL = 404


class EndpointDown(RuntimeError):
    """Too many requests failed one after the other; the run stops, and can go on later."""


class Unanswered(ValueError):
    """One request that cannot be answered: refused by the server, or failed each time it was asked."""


class Malformed(RuntimeError):
    """The server answered, but not in the protocol."""


def endpoint_key(settings: EndpointSettings) -> SecretStr:
    """The key from the environment of the process that starts the run; hidden wherever it is printed."""
    return SecretStr(os.environ.get(settings.key_variable, NO_KEY))


def endpoint_cost(rows: list[Row], prices: tuple[float, float]) -> dict[str, float]:
    """Tokens read and written by the answers of `rows`, and their cost at prices per million of each."""
    read = sum(count or 0 for row in rows for name, count in row.items() if name.endswith("_prompt_length"))
    written = sum(count or 0 for row in rows for name, count in row.items() if name.endswith("_tokens"))
    return {"tokens_read": read, "tokens_written": written, "cost": (read * prices[0] + written * prices[1]) / 1e6}


class Endpoint:
    """A client of one server for one model.

    Args:
        settings: the `[synthesis.endpoint]` section.
        key: what `endpoint_key` gave.
    """

    def __init__(self, settings: EndpointSettings, key: SecretStr):
        self.settings = settings
        self.client = _client(settings, key)
        self.places = asyncio.Semaphore(settings.concurrency)
        self.next_start = 0.0
        self.failed_in_a_row = 0

    async def say(self, messages: Messages, sampling: Sampling, seed: int) -> Generation:
        """One answer to a conversation.

        Raises:
            Unanswered: the server refuses the request, or it failed too often.
            InputError: the key or the model is refused.
            EndpointDown: `failures_in_a_row` requests failed one after the other.
        """
        async with self.places:
            try:
                answer = await self._ask(messages, sampling, seed)
            except _failures() as error:
                self._count_failure(error)
                raise Unanswered(f"the endpoint failed: {error}") from None
        self.failed_in_a_row = 0
        return answer

    async def _ask(self, messages: Messages, sampling: Sampling, seed: int) -> Generation:
        """Ask until the answer is one; what the client has tried again already is not tried again."""
        for attempt in range(self.settings.retries + 1):
            await self._wait_for_turn()
            try:
                return _generation(await self._request(messages, sampling, seed))
            except Malformed:
                if attempt == self.settings.retries:
                    raise
                await asyncio.sleep(self.settings.pause_s * 2**attempt)
        raise AssertionError("unreachable")

    async def _request(self, messages: Messages, sampling: Sampling, seed: int) -> Any:
        from openai import APIResponseValidationError, APIStatusError, InternalServerError, RateLimitError

        try:
            return await self.client.chat.completions.create(
                model=self.settings.model,
                messages=messages,  # type: ignore[arg-type]
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=seed,
            )
        except (RateLimitError, InternalServerError):
            raise
        except APIStatusError as error:
            raise self._refusal(error) from None
        except (ValueError, APIResponseValidationError) as error:
            raise Malformed(f"the body is not JSON: {error}") from None

    async def _wait_for_turn(self) -> None:
        """Requests start evenly spaced, so many a minute."""
        if not self.settings.requests_per_minute:
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self.next_start)
        self.next_start = start + 60 / self.settings.requests_per_minute
        await asyncio.sleep(start - now)

    def _refusal(self, error: Any) -> Exception:
        if error.status_code in REFUSED_KEY:
            variable = self.settings.key_variable
            return InputError(f"synthesis.endpoint: {self.settings.url} refuses the key in {variable}; set it right")
        if error.status_code == UNKNOWN_MODEL:
            return InputError(
                f"synthesis.endpoint: {self.settings.url} does not know {self.settings.model!r} (404); "
                f"correct `model`, or `url`, which mostly ends with /v1"
            )
        return Unanswered(f"the endpoint refuses it ({error.status_code}): {str(error.message)[:200]}")

    def _count_failure(self, error: Exception) -> None:
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= self.settings.failures_in_a_row:
            raise EndpointDown(
                f"{self.failed_in_a_row} requests to {self.settings.url} failed one after the other, the last with: "
                f"{error}; the same command goes on when the server answers again"
            ) from None


def _failures() -> tuple[type[Exception], ...]:
    """What is left after the client has tried again: each counts towards a server that is gone."""
    from openai import APIConnectionError, InternalServerError, RateLimitError

    return (APIConnectionError, InternalServerError, RateLimitError, Malformed)


def _client(settings: EndpointSettings, key: SecretStr) -> AsyncOpenAI:
    try:
        from openai import AsyncOpenAI
    except ImportError:
        raise InputError('synthesis.endpoint needs the openai package; pip install "rdpo[endpoint]"') from None
    return AsyncOpenAI(
        base_url=settings.url,
        api_key=key.get_secret_value(),
        timeout=settings.timeout_s,
        max_retries=settings.retries,
    )


def _generation(response: Any) -> Generation:
    """The first choice of a chat completion."""
    try:
        choice, usage = response.choices[0], response.usage
        text, reason = choice.message.content, choice.finish_reason
        tokens = (usage.completion_tokens, usage.prompt_tokens) if usage else (0, 0)
    except (AttributeError, TypeError, IndexError) as error:
        raise Malformed(f"not a chat completion: {error}") from None
    if reason == "content_filter":
        raise Unanswered("the endpoint's content filter withheld the answer")
    if not isinstance(text, str):
        raise Malformed("the answer has no text")
    return Generation(text, "length" if reason == "length" else "stop", tokens[0], prompt_tokens=tokens[1])
