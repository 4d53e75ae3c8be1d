"""A model behind a server that speaks the OpenAI protocol: conversations in, the beginning of a chat completion out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from pydantic import SecretStr

from rdpo.config import Endpoint as EndpointSettings
from rdpo.config import Sampling
from rdpo.errors import EndpointDown, InputError
from rdpo.messages import server_form, tools_of
from rdpo.modeling.reasoning import KEYS, Unended, split_inline
from rdpo.records import Messages
from rdpo.synthesis.engine import Generation
from rdpo.synthesis.server import Failed, Server, Unanswered, check_server, endpoint_key

__all__ = ["Endpoint", "EndpointDown", "Unanswered", "check_endpoint", "cost", "endpoint_key"]

T = TypeVar("T")

TEACHER = "synthesis.endpoint"
HARMLESS: Messages = [{"role": "user", "content": "Say hello."}]
OPENAI = frozenset({"stop", "presence_penalty", "frequency_penalty"})
"""Fields of `Sampling` that OpenAI's own protocol has, beyond those that are always sent."""
CONTINUED = {"add_generation_prompt": False, "continue_final_message": True, "return_prompt_text": True}
"""How vLLM's server is asked to go on from a message, and to say what its model was asked with."""


def check_endpoint(settings: EndpointSettings, where: str = TEACHER) -> None:
    """Find out before the long work whether the endpoint can be asked at all.

    Raises:
        InputError: the openai package or the key is missing.
    """
    check_server(settings, where)


def cost(read: int, written: int, prices: tuple[float, float]) -> float:
    """Cost of tokens read and written at prices per million of each."""
    return (read * prices[0] + written * prices[1]) / 1e6


class Endpoint:
    """A client of one server for one model.

    Args:
        settings: the `endpoint` table.
        key: what `endpoint_key` gave.
        where: the table's name, for messages.
    """

    def __init__(self, settings: EndpointSettings, key: SecretStr, where: str = TEACHER):
        self.settings, self.where = settings, where
        remedy = "`model`, or `url`, which mostly ends with /v1"
        self.server = Server(settings, key, where, repr(settings.model), remedy, self._advice)

    async def say(
        self, messages: Messages, sampling: Sampling, seed: int, reasons: bool = False, **arguments: Any
    ) -> Generation:
        """One answer to a conversation.

        Args:
            messages: the conversation.
            sampling: how the answer is drawn.
            seed: of the draws.
            reasons: reasoning is told from the answer. A server has one limit for both: the sum of their budgets.
            arguments: further ones of the chat template, which vLLM's server and others of its kind take.

        Raises:
            Unanswered: the server will not answer it.
            InputError: the key or the model is refused.
            EndpointDown: it cannot be answered, nor can anything else.
        """
        read = partial(generation, keyless=self.server.keyless, reasons=reasons)
        if reasons:
            most = sampling.max_tokens + sampling.max_reasoning_tokens
            sampling = sampling.model_copy(update={"max_tokens": most})
        extra: dict[str, Any] = {"chat_template_kwargs": arguments} if arguments else {}
        return await self.complete(messages, sampling, seed, read, **extra)

    async def complete(
        self,
        messages: Messages,
        sampling: Sampling,
        seed: int,
        read: Callable[[Any], T],
        prefill: str = "",
        **extra: Any,
    ) -> T:
        """What `read` finds in a chat completion that goes on from `prefill`.

        Errors are those of `say`, and those that `read` raises: `Failed` where the completion is none.

        Args:
            messages: the conversation.
            sampling: how the answer is drawn.
            seed: of the draws.
            read: gives what is wanted of the completion.
            prefill: the answer's first words.
            extra: parameters of the request that a sampling does not have.
        """
        if prefill:
            read, extra = partial(self._continued, prefill, read), {**CONTINUED, **extra}
        asked = [
            partial(self._ask, [*one, *_begun(prefill)], sampling, seed, read, extra) for one in (messages, HARMLESS)
        ]
        return await self.server.answer(*asked)

    async def _ask(
        self, messages: Messages, sampling: Sampling, seed: int, read: Callable[[Any], T], extra: dict[str, Any]
    ) -> T:
        request: dict[str, Any] = {
            "model": self.settings.model,
            "messages": server_form(messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            self.settings.token_limit: sampling.max_tokens,
            **{name: value for name, value in sampling.used.items() if name in OPENAI},
        }
        if tools := tools_of(messages):
            request["tools"] = [one if "function" in one else {"type": "function", "function": one} for one in tools]
        # Known to vLLM's server and others of its kind.
        others = {name: value for name, value in sampling.used.items() if name not in OPENAI} | extra
        if others:
            request["extra_body"] = others
        return read(await self.server.send(lambda client: client.chat.completions.create(**request)))

    def _continued(self, prefill: str, read: Callable[[Any], T], response: Any) -> T:
        """What `read` finds, after a look at what the model was asked with: that it ends with the answer's first words.

        A server that does not know of them would answer from the beginning, and some templates strip blanks.
        """
        asked = getattr(response, "prompt_text", None)
        table = self.where.removesuffix(".endpoint")
        if not isinstance(asked, str):
            raise InputError(
                f"{table}.prefill: {self.settings.url} does not say whether its model goes on from it (prompt_text, as "
                "vLLM's server has it); remove prefill, or ask a server of vLLM's"
            )
        if not asked.endswith(prefill):
            raise InputError(
                f"{table}.prefill: {self.settings.url} asks with {asked[-len(prefill) - 20 :]!r}, which does not end "
                f"with {prefill!r}; correct prefill, blanks at its end perhaps, or remove it"
            )
        return read(response)

    def _advice(self, said: str) -> str:
        if self.settings.token_limit == "max_tokens" and "max_completion_tokens" in said:
            return f'; give {self.where}.token_limit = "max_completion_tokens"'
        if "logprob" in said:
            table = self.where.removesuffix(".endpoint")
            return f'; give {table}.top_logprobs the number that it takes, or {table}.score = "written"'
        return ""


def _begun(prefill: str) -> Messages:
    return [{"role": "assistant", "content": prefill}] if prefill else []


def usage_of(response: Any) -> tuple[int, int]:
    """Tokens read and written for a chat completion; zeros where the server does not say."""
    usage = getattr(response, "usage", None)
    read, written = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    return (read if isinstance(read, int) else 0, written if isinstance(written, int) else 0)


def withheld(response: Any, keyless: Callable[[str], str]) -> None:
    """Look whether a chat completion has an answer.

    Raises:
        Failed: it is no chat completion.
        Unanswered: the answer is withheld.
    """
    try:
        choice = response.choices[0]
        reason, refusal = choice.finish_reason, choice.message.refusal
    except (AttributeError, TypeError, LookupError) as error:
        raise Failed(f"not a chat completion: {error}", broken=True) from None
    if reason == "content_filter" or refusal:
        raise Unanswered(f"the endpoint withholds the answer: {keyless(str(refusal or reason))[:200]}")
    if getattr(choice.message, "tool_calls", None):
        raise Unanswered("the endpoint calls a tool in place of an answer")


def generation(response: Any, keyless: Callable[[str], str], reasons: bool = False) -> Generation:
    """The first choice of a chat completion; `reasons`: with the reasoning before its answer.

    Raises:
        Failed: it is no chat completion.
        Unanswered: the answer is withheld, has no text, or ends inside its reasoning.
    """
    withheld(response, keyless)
    choice, (read, written) = response.choices[0], usage_of(response)
    text, reason = choice.message.content, choice.finish_reason
    if not isinstance(text, str):
        if reason == "length":
            raise Unanswered("the endpoint wrote no text within max_tokens")
        raise Failed("the answer has no text", broken=True)

    reasoning = ""
    if reasons:
        try:
            # A server that does not part them leaves both in the text.
            inline, text = split_inline(text)
        except Unended as error:
            raise Unanswered(str(error)) from None
        reasoning = _stated_reasoning(choice.message) or inline
    ended = "length" if reason == "length" else "stop"
    return Generation(keyless(text), ended, written, prompt_tokens=read, reasoning=keyless(reasoning))


def _stated_reasoning(message: Any) -> str:
    """What a server says was thought before an answer, under one of the names that servers have for it."""
    stated = (getattr(message, key, None) for key in KEYS)
    return next((one.strip() for one in stated if isinstance(one, str) and one.strip()), "")
