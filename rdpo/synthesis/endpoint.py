"""The teacher behind an OpenAI-compatible server: requests at the same time, at a rate, again where they failed.

What the server will not answer drops its row: a request it refuses, an answer it withholds. What it cannot answer
now is asked again: 429, 5xx, timeouts, cut connections, bodies that are not the protocol's. If that does not help
and nothing else is answered either, the server is gone: the run ends, no row is lost, and the same command goes
on. A refused key or an unknown model ends the run too.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from rdpo.config import Endpoint as EndpointSettings
from rdpo.config import Sampling
from rdpo.errors import InputError
from rdpo.records import Messages
from rdpo.synthesis.engine import Generation

if TYPE_CHECKING:
    from openai import AsyncOpenAI

NO_KEY = "none"
HIDDEN = "[key]"
LATER = (408, 409, 425, 429)
NO_ACCESS = (401, 402)
UNKNOWN_MODEL = 404
SERVER_ERROR = 500
LONGEST_PAUSE_S = 600.0


class EndpointDown(RuntimeError):
    """The server answers nothing any more; the run stops, and can go on later."""


class Unanswered(ValueError):
    """One request that the server will not answer."""


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

    async def say(self, messages: Messages, sampling: Sampling, seed: int) -> Generation:
        """One answer to a conversation.

        Raises:
            Unanswered: the server will not answer it.
            InputError: the key or the model is refused.
            EndpointDown: it cannot be answered, nor can anything else.
        """
        async with self.places:
            before, attempt = self.answered, 0
            while True:
                await self._wait_for_turn()
                try:
                    generation = await self._ask(messages, sampling, seed)
                except Failed as failure:
                    if attempt == self.settings.retries:
                        raise self._given_up(failure, before) from None
                    await asyncio.sleep(max(failure.pause, self.settings.pause_s * 2**attempt))
                    attempt += 1
                else:
                    self.answered += 1
                    return generation

    async def _ask(self, messages: Messages, sampling: Sampling, seed: int) -> Generation:
        from openai import APIConnectionError, APIResponseValidationError, APIStatusError

        try:
            response = await self.client.chat.completions.create(
                model=self.settings.model,
                messages=messages,  # type: ignore[arg-type]
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=seed,
            )
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
        if status >= SERVER_ERROR or status in LATER:
            return Failed(said, _asked_pause(error.response.headers), broken=status == SERVER_ERROR)
        if self.answered and status not in NO_ACCESS:
            return Unanswered(f"the endpoint refuses it {said}")
        if status in NO_ACCESS:
            where = self.settings.key_variable or "key_variable, which names none"
            return InputError(f"synthesis.endpoint: {self.settings.url} refuses the key in {where} {said}")
        if status == UNKNOWN_MODEL:
            return InputError(
                f"synthesis.endpoint: {self.settings.url} does not know {self.settings.model!r} {said}; "
                f"correct `model`, or `url`, which mostly ends with /v1"
            )
        return Unanswered(f"the endpoint refuses it {said}")

    def _given_up(self, failure: Failed, before: int) -> Exception:
        """The row's fault, if others were answered meanwhile, or if a server that has answered breaks on this one."""
        if self.answered > before or (self.answered and failure.broken):
            return Unanswered(f"the endpoint failed each time, the last with {failure}")
        return EndpointDown(
            f"{self.settings.url} answers nothing any more, {self.settings.retries + 1} attempts ended with {failure}; "
            f"the same command resumes when it does"
        )


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
