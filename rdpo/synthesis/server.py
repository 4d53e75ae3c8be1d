"""A server elsewhere: requests at the same time, at a rate, again where they failed.

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
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import SecretStr

from rdpo.config import Server as ServerSettings
from rdpo.errors import EndpointDown, InputError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")
S = TypeVar("S", bound=ServerSettings)
Ask = Callable[[], Awaitable[T]]
"""One attempt at a request."""

NO_KEY = "none"
HIDDEN = "[key]"
LATER = (408, 409, 425, 429)
QUOTA = 429
NO_ACCESS = (401, 402)
UNKNOWN = (404, 405)
SERVER_ERROR = 500
LONGEST_PAUSE_S = 600.0
USED_UP = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
"""Codes of 429 that no waiting helps against."""
SAID_CHARS = 200
TRIAL_S = 10.0
"""Seconds that a server is waited for before the long work."""
ENDS: tuple[type[Exception], ...] = (InputError, EndpointDown)
"""Errors of a server after which no other request is answered."""


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


def check_server(settings: ServerSettings, where: str) -> None:
    """Find out before the long work whether a server can be asked at all; `where` is the table that names it.

    Raises:
        InputError: the openai package or the key is missing.
    """
    _client(settings, SecretStr(NO_KEY), where)
    if settings.key_variable and settings.key_variable not in os.environ:
        raise InputError(f"{where}.key_variable: {settings.key_variable} is not set in the environment")


def endpoint_key(settings: ServerSettings) -> SecretStr:
    """The key from the environment of the process that starts the run; hidden wherever it is printed."""
    return SecretStr(os.environ.get(settings.key_variable, NO_KEY) if settings.key_variable else NO_KEY)


def try_server(ask: Callable[[], Awaitable[object]]) -> None:
    """Ask a server one small question on the driver, before the long work; one that is not there yet is no fault.

    Raises:
        InputError: it answers, and cannot be asked what it will be asked.
    """

    async def asked() -> None:
        try:
            await ask()
        except (ValueError, Failed, EndpointDown):
            # Of one question nothing else is known.
            return

    # A notebook has a loop of its own, in which none can be run.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, asked()).result()


def for_one_question(settings: S) -> S:
    """The same server for one question, which is asked once and waited for only a while."""
    return settings.model_copy(update={"retries": 0, "timeout_s": min(settings.timeout_s, TRIAL_S)})


def root_of(url: str) -> str:
    """Where vLLM's server has what is not OpenAI's: its address without `/v1`."""
    return url.rstrip("/").removesuffix("/v1")


class Server:
    """A client of one server.

    Args:
        settings: where it is and how it is asked.
        key: what `endpoint_key` gave.
        where: the job's table that names it, for messages.
        named: what the server must know, as `the model 'm'`.
        remedy: what to correct where it does not.
        advise: what to set against a refusal of every request, from the server's words.
    """

    def __init__(
        self,
        settings: ServerSettings,
        key: SecretStr,
        where: str,
        named: str,
        remedy: str,
        advise: Callable[[str], str] = lambda said: "",
    ):
        self.settings, self.where, self.named, self.remedy, self.advise = settings, where, named, remedy, advise
        self.key = key.get_secret_value() if settings.key_variable else None
        self.client = _client(settings, key, where)
        self.places = asyncio.Semaphore(settings.concurrency)
        self.next_start = 0.0
        self.answered = 0
        self.first, self.checking = asyncio.Lock(), asyncio.Lock()
        self.ended: InputError | EndpointDown | None = None

    async def answer(self, ask: Ask[T], harmless: Ask[Any]) -> T:
        """What comes of a request; `harmless` is one that a server which answers anything answers.

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
                        return await self._answer(ask, harmless)
            return await self._answer(ask, harmless)

    async def insist(self, ask: Ask[T]) -> T:
        """What comes of a request, made again while the server fails.

        Raises:
            Failed: it failed each time.
        """
        attempt = 0
        while True:
            await self._wait_for_turn()
            try:
                return await ask()
            except Failed as failure:
                if attempt == self.settings.retries:
                    raise
                await asyncio.sleep(max(failure.pause, self.settings.pause_s * 2**attempt))
                attempt += 1

    async def send(self, request: Callable[[AsyncOpenAI], Awaitable[Any]]) -> Any:
        """One attempt through the client, whose errors become those that `answer` knows."""
        from openai import APIConnectionError, APIResponseValidationError, APIStatusError

        try:
            return await request(self.client)
        except APIStatusError as error:
            raise self._status(error) from None
        except APIConnectionError as error:
            raise Failed(self.keyless(f"{type(error).__name__}: {error}")) from None
        except (ValueError, RecursionError, APIResponseValidationError) as error:
            raise Failed(self.keyless(f"the body is not JSON: {error}"), broken=True) from None

    def check(self) -> None:
        """Look whether the server has ended.

        Raises:
            InputError, EndpointDown: it has.
        """
        if self.ended:
            raise self.ended

    def end(self, error: InputError) -> InputError:
        """Ask nothing more, for a reason that its user has found; gives the error back."""
        self.ended = error
        return error

    def keyless(self, text: str) -> str:
        """What a server says, without the key, which it may repeat: it would stand in tables, logs and data sets."""
        return text.replace(self.key, HIDDEN) if self.key else text

    async def _answer(self, ask: Ask[T], harmless: Ask[Any]) -> T:
        self.check()
        try:
            found = await self.insist(ask)
        except Refused as refusal:
            await self._check_others(harmless, refusal)
            raise Unanswered(f"the endpoint refuses it {refusal}") from None
        except Failed as failure:
            if not (self.answered and failure.broken):
                await self._check_others(harmless, failure)
            raise Unanswered(f"the endpoint failed each time, the last with {failure}") from None
        except (InputError, EndpointDown) as end:
            self.ended = end
            raise
        self.answered += 1
        return found

    async def _check_others(self, harmless: Ask[Any], fault: Exception) -> None:
        """Find out by a harmless question whether the server answers at all.

        Raises:
            InputError: it refuses that too.
            EndpointDown: it does not answer that either.
        """
        async with self.checking:
            self.check()
            try:
                await self.insist(harmless)
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
        return InputError(
            f"{self.where}: {self.settings.url} refuses every request, a harmless one too "
            f"{refusal}{self.advise(str(refusal))}; the rows stay to be done, and the same command resumes when it "
            "does not"
        )

    def _down(self, failure: Failed) -> EndpointDown:
        return EndpointDown(
            f"{self.settings.url} answers nothing any more, {self.settings.retries + 1} attempts ended with {failure}; "
            f"the same command resumes when it does"
        )

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
        status = error.status_code
        said = f"({status}): {self.keyless(str(error.message))[:SAID_CHARS]}"
        if status == QUOTA and error.code in USED_UP:
            return InputError(
                f"{self.where}: the quota at {self.settings.url} is used up {said}; the rows stay to be done"
            )
        if status >= SERVER_ERROR or status in LATER:
            return Failed(said, _asked_pause(error.response.headers), broken=status == SERVER_ERROR)
        if status in NO_ACCESS:
            variable = self.settings.key_variable or "key_variable, which names none"
            return InputError(f"{self.where}: {self.settings.url} refuses the key in {variable} {said}")
        if status in UNKNOWN and not self.answered:
            return InputError(
                f"{self.where}: {self.settings.url} does not know {self.named} {said}; correct {self.remedy}"
            )
        return Refused(said)


def _asked_pause(headers: Any) -> float:
    """Seconds that the server asks to wait; 0 if it does not say, or gives a date."""
    try:
        return min(float(headers.get("retry-after", 0)), LONGEST_PAUSE_S)
    except ValueError:
        return 0.0


def _client(settings: ServerSettings, key: SecretStr, where: str) -> AsyncOpenAI:
    try:
        from openai import AsyncOpenAI
    except ImportError:
        raise InputError(f'{where} needs the openai package; pip install "rdpo[endpoint]"') from None
    return AsyncOpenAI(base_url=settings.url, api_key=key.get_secret_value(), timeout=settings.timeout_s, max_retries=0)
