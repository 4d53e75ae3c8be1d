"""The teacher behind an OpenAI-compatible server: requests at the same time, at a rate, again where they failed.

What the server will not answer drops its row: a request it refuses, an answer it withholds. Whether a refusal is the
row's fault is found out by a harmless question, asked in the same way: if that is refused too, it is the account or the
way of asking, and the run ends without the row being lost. What the server cannot answer now is asked again: 429, 5xx,
timeouts, cut connections, bodies that are not the protocol's. If that does not help and the harmless question is not
answered either, the server is gone: the run ends, and the same command goes on. A refused key, an unknown model or a
quota that is used up end the run too. Until something has been answered, one request is made at a time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from rdpo.config import Endpoint as EndpointSettings
from rdpo.config import Sampling
from rdpo.errors import EndpointDown, InputError
from rdpo.records import Messages
from rdpo.synthesis.engine import Generation

if TYPE_CHECKING:
    from openai import AsyncOpenAI

NO_KEY = "none"
HIDDEN = "[key]"
LATER = (408, 409, 425, 429)
QUOTA = 429
NO_ACCESS = (401, 402)
UNKNOWN_MODEL = 404
SERVER_ERROR = 500
LONGEST_PAUSE_S = 600.0
USED_UP = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
"""Codes of 429 that no waiting helps against."""
HARMLESS: Messages = [{"role": "user", "content": "Say hello."}]


class Unanswered(ValueError):
    """One request that the server will not answer."""


class Refused(ValueError):
    """One request that the server refuses, for the row's sake or for that of all."""


class Failed(RuntimeError):
    """One attempt that may succeed later: `pause` is how long the server asks to wait, in seconds.

    `broken` says that the server did reply, with an error or with what is no answer, so that the
    fault may be the request's.
    """

    def __init__(self, message: str, pause: float = 0.0, broken: bool = False):
        super().__init__(message)
        self.pause, self.broken = pause, broken


def check_endpoint(settings: EndpointSettings) -> None:
    """Find out before the long work whether the endpoint can be asked at all.

    Raises:
        InputError: the openai package or the key is missing.
    """
    _client(settings, SecretStr(NO_KEY))
    if settings.key_variable and settings.key_variable not in os.environ:
        raise InputError(f"synthesis.endpoint.key_variable: {settings.key_variable} is not set in the environment")


def endpoint_key(settings: EndpointSettings) -> SecretStr:
    """The key from the environment of the process that starts the run; hidden wherever it is printed."""
    return SecretStr(os.environ.get(settings.key_variable, NO_KEY) if settings.key_variable else NO_KEY)


def cost(read: int, written: int, prices: tuple[float, float]) -> float:
    """Cost of tokens read and written at prices per million of each."""
    return (read * prices[0] + written * prices[1]) / 1e6


OPENAI = frozenset({"stop", "presence_penalty", "frequency_penalty"})
"""Fields of `Sampling` that OpenAI's own protocol has, beyond those that are always sent."""


class Endpoint:
    """A client of one server for one model.

    Args:
        settings: the `[synthesis.endpoint]` section.
        key: what `endpoint_key` gave.
    """

    def __init__(self, settings: EndpointSettings, key: SecretStr):
        self.settings = settings
        self.key = key.get_secret_value() if settings.key_variable else None
        self.client = _client(settings, key)
        self.places = asyncio.Semaphore(settings.concurrency)
        self.next_start = 0.0
        self.answered = 0
        self.first, self.checking = asyncio.Lock(), asyncio.Lock()
        self.ended: InputError | EndpointDown | None = None

    async def say(self, messages: Messages, sampling: Sampling, seed: int) -> Generation:
        """One answer to a conversation.

        Raises:
            Unanswered: the server will not answer it.
            InputError: the key or the model is refused.
            EndpointDown: it cannot be answered, nor can anything else.
        """
        async with self.places:
            if not self.answered:
                async with self.first:
                    # By the time that its turn has come, another may have been answered.
                    if not self.answered:
                        return await self._answer(messages, sampling, seed)
            return await self._answer(messages, sampling, seed)

    async def _answer(self, messages: Messages, sampling: Sampling, seed: int) -> Generation:
        if self.ended:
            raise self.ended
        try:
            generation = await self._insist(messages, sampling, seed)
        except Refused as refusal:
            await self._check_others(sampling, refusal)
            raise Unanswered(f"the endpoint refuses it {refusal}") from None
        except Failed as failure:
            if not (self.answered and failure.broken):
                await self._check_others(sampling, failure)
            raise Unanswered(f"the endpoint failed each time, the last with {failure}") from None
        except (InputError, EndpointDown) as end:
            self.ended = end
            raise
        self.answered += 1
        return generation

    async def _insist(self, messages: Messages, sampling: Sampling, seed: int) -> Generation:
        """The answer, asked for again while the server fails."""
        attempt = 0
        while True:
            await self._wait_for_turn()
            try:
                return await self._ask(messages, sampling, seed)
            except Failed as failure:
                if attempt == self.settings.retries:
                    raise
                await asyncio.sleep(max(failure.pause, self.settings.pause_s * 2**attempt))
                attempt += 1

    async def _check_others(self, sampling: Sampling, fault: Exception) -> None:
        """Find out by a harmless question whether the server answers at all.

        Raises:
            InputError: it refuses that too.
            EndpointDown: it does not answer that either.
        """
        async with self.checking:
            if self.ended:
                raise self.ended
            try:
                await self._insist(HARMLESS, sampling, 0)
            except Refused as refusal:
                self.ended = self._refuses_all(refusal)
            except Failed as failure:
                self.ended = self._down(failure)
            except (InputError, EndpointDown) as end:
                self.ended = end
            except Unanswered:
                # A server that withholds an answer has at least read the question.
                return
            if self.ended:
                raise self.ended from fault

    def _refuses_all(self, refusal: Refused) -> InputError:
        advice = ""
        if self.settings.token_limit == "max_tokens" and "max_completion_tokens" in str(refusal):
            advice = '; give synthesis.endpoint.token_limit = "max_completion_tokens"'
        return InputError(
            f"synthesis.endpoint: {self.settings.url} refuses every request, a harmless one too {refusal}{advice}; "
            "the rows stay to be done, and the same command resumes when it does not"
        )

    def _down(self, failure: Failed) -> EndpointDown:
        return EndpointDown(
            f"{self.settings.url} answers nothing any more, {self.settings.retries + 1} attempts ended with {failure}; "
            f"the same command resumes when it does"
        )

    async def _ask(self, messages: Messages, sampling: Sampling, seed: int) -> Generation:
        from openai import APIConnectionError, APIResponseValidationError, APIStatusError

        request: dict[str, Any] = {
            "model": self.settings.model,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            self.settings.token_limit: sampling.max_tokens,
            **{name: value for name, value in sampling.used.items() if name in OPENAI},
        }
        if others := {name: value for name, value in sampling.used.items() if name not in OPENAI}:
            # Known to vLLM's server and others of its kind.
            request["extra_body"] = others
        try:
            response = await self.client.chat.completions.create(**request)
        except APIStatusError as error:
            raise self._status(error) from None
        except APIConnectionError as error:
            raise Failed(self._keyless(f"{type(error).__name__}: {error}")) from None
        except (ValueError, APIResponseValidationError) as error:
            raise Failed(self._keyless(f"the body is not JSON: {error}"), broken=True) from None
        return _generation(response, self._keyless)

    def _keyless(self, text: str) -> str:
        """What a server says, without the key, which it may repeat: it would stand in tables, logs and data sets."""
        return text.replace(self.key, HIDDEN) if self.key else text

    async def _wait_for_turn(self) -> None:
        """Requests start evenly spaced, so many a minute."""
        if not self.settings.requests_per_minute:
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self.next_start)
        self.next_start = start + 60 / self.settings.requests_per_minute
        await asyncio.sleep(start - now)

    def _status(self, error: Any) -> Exception:
        """What an HTTP error means for the request or the run."""
        status, said = error.status_code, f"({error.status_code}): {self._keyless(str(error.message))[:200]}"
        if status == QUOTA and error.code in USED_UP:
            return InputError(
                f"synthesis.endpoint: the quota at {self.settings.url} is used up {said}; the rows stay to be done"
            )
        if status >= SERVER_ERROR or status in LATER:
            return Failed(said, _asked_pause(error.response.headers), broken=status == SERVER_ERROR)
        if status in NO_ACCESS:
            where = self.settings.key_variable or "key_variable, which names none"
            return InputError(f"synthesis.endpoint: {self.settings.url} refuses the key in {where} {said}")
        if status == UNKNOWN_MODEL and not self.answered:
            return InputError(
                f"synthesis.endpoint: {self.settings.url} does not know {self.settings.model!r} {said}; "
                f"correct `model`, or `url`, which mostly ends with /v1"
            )
        return Refused(said)


def _asked_pause(headers: Any) -> float:
    """Seconds that the server asks to wait; 0 if it does not say, or gives a date."""
    try:
        return min(float(headers.get("retry-after", 0)), LONGEST_PAUSE_S)
    except ValueError:
        return 0.0


def _client(settings: EndpointSettings, key: SecretStr) -> AsyncOpenAI:
    try:
        from openai import AsyncOpenAI
    except ImportError:
        raise InputError('synthesis.endpoint needs the openai package; pip install "rdpo[endpoint]"') from None
    return AsyncOpenAI(base_url=settings.url, api_key=key.get_secret_value(), timeout=settings.timeout_s, max_retries=0)


def _generation(response: Any, keyless: Callable[[str], str]) -> Generation:
    """The first choice of a chat completion."""
    try:
        choice, usage = response.choices[0], response.usage
        text, reason, refusal = choice.message.content, choice.finish_reason, choice.message.refusal
        tokens = (usage.completion_tokens, usage.prompt_tokens) if usage else (0, 0)
    except (AttributeError, TypeError, IndexError) as error:
        raise Failed(f"not a chat completion: {error}", broken=True) from None
    if reason == "content_filter" or refusal:
        raise Unanswered(f"the endpoint withholds the answer: {keyless(str(refusal or reason))[:200]}")
    if not isinstance(text, str):
        if reason == "length":
            raise Unanswered("the endpoint wrote no text within max_tokens")
        raise Failed("the answer has no text", broken=True)
    return Generation(keyless(text), "length" if reason == "length" else "stop", tokens[0], prompt_tokens=tokens[1])
