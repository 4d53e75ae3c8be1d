"""Conversations out of the forms that data sets give them: all of what was given, or the reason why not.

A preference data set writes a pair as a prompt and two answers, as two whole conversations, or as a mixture: the prompt
as text, as messages, or only within the conversations; the answers as text, as messages, or as what text made of
messages (JSON, Python's repr). From all of these one prompt is derived, the common beginning of both sides, and one
answer for each side. Where a message, one of its keys or a turn would be lost, the row is `Unusable`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from rdpo.messages import CALL_ID, CALLS, NAME, TOOLS, calls_text, is_plain, with_tools
from rdpo.modeling.reasoning import KEYS, Unended, split_inline
from rdpo.records import ROLES, SIDES, Messages, clean, text_of

LITERAL_CHARS = 1 << 20
"""Longest text that is read as Python's repr of messages."""
SHOWN_CHARS = 60
T = TypeVar("T", str, Messages, str | Messages | None)


class Unusable(ValueError):
    """A row is no conversation that can be kept whole; the message says why."""


@dataclass(frozen=True)
class Pair:
    """A prompt, which ends with the user's or a tool's message, and the text of two answers to it."""

    prompt: Messages
    answers: dict[str, str]
    reasoning: dict[str, str] = field(default_factory=dict)
    """What was thought before each answer, where it was asked for."""
    completions: dict[str, Messages] = field(default_factory=dict)
    """The messages of an answer that is more than one with a text: one that calls tools, or several."""


def derive_pair(raw: Mapping[str, object], column: str, reasoning: bool = False, several: bool = False) -> Pair:
    """The pair of a row whose prompt, if it has one of its own, stands in `column`.

    Args:
        raw: the row.
        column: the column with the prompt.
        reasoning: what is written before an answer is told from it, and left out of earlier turns as templates do.
        several: an answer may be of several messages, the results of tools among them.

    Raises:
        Unusable: something is missing, contradicts itself, or would be lost.
    """
    pair = _derived(raw, column, reasoning, several)
    if pair.completions and reasoning:
        raise Unusable("an answer of calls or of several messages cannot be read with reasoning; set it to off")
    return replace(pair, prompt=_with_tools(pair.prompt, raw))


def _derived(raw: Mapping[str, object], column: str, reasoning: bool, several: bool) -> Pair:
    prompt = None if raw.get(column) is None else _read(raw[column], column)
    sides = {side: _read(raw.get(side), side) for side in SIDES}
    if reasoning:
        return _reasoned_pair(prompt, sides, column, several)
    for name, value in ((column, prompt), *sides.items()):
        _check_no_reasoning(value, name)
    return _pair_of(prompt, sides, column, several)


def _reasoned_pair(
    prompt: str | Messages | None, sides: Mapping[str, str | Messages], column: str, several: bool
) -> Pair:
    """A pair with the reasoning before its answers."""
    parted = {side: _answer_parted(value, side) for side, value in sides.items()}
    answers = {side: value for side, (value, _) in parted.items()}
    pair = _pair_of(_without_reasoning(prompt), answers, column, several)
    return replace(pair, reasoning={side: thought for side, (_, thought) in parted.items()})


def _answer_parted(value: str | Messages, side: str) -> tuple[str | Messages, str]:
    """One side without reasoning, and the reasoning before its answer."""
    try:
        if isinstance(value, str):
            thought, answer = split_inline(value)
            return answer if thought else value, thought
        last = value[-1]
        thought, answer = split_inline(last["content"])
    except Unended as error:
        raise Unusable(f"{side}: {error}") from None
    stated = next((last[key] for key in KEYS if key in last), "")
    bare = [{**message, "content": answer} for message in _without_reasoning([last])]
    return [*_without_reasoning(value[:-1]), *bare], stated.strip() or thought


def _pair_of(prompt: str | Messages | None, sides: Mapping[str, str | Messages], column: str, several: bool) -> Pair:
    wholes = {side: _whole(prompt, sides, side, column) for side in SIDES}

    shared = _common_beginning(*wholes.values())
    for side, messages in wholes.items():
        if not several:
            _check_one_answer(side, len(messages) - len(shared))
    if not shared:
        raise Unusable(f"{column}: chosen and rejected have no beginning in common, and there is no prompt beside them")
    check_last(shared, column)
    following = {side: messages[len(shared) :] for side, messages in wholes.items()}
    whole = {side: answer for side, answer in following.items() if answer[1:] or not is_plain(answer)}
    return Pair(shared, {side: text_of(answer) for side, answer in following.items()}, completions=whole)


def _check_no_reasoning(value: str | Messages | None, column: str | None) -> None:
    """Look for reasoning beside the content of messages.

    Raises:
        Unusable: there is some.
    """
    for message in value if isinstance(value, list) else []:
        if key := next((key for key in KEYS if key in message), None):
            reason = f"a message of the assistant has `{key}`, which would be lost; set synthesis.reasoning"
            raise Unusable(_place(column, reason))


def _without_reasoning(value: T) -> T:
    """Messages with nothing but role and content; text as it is."""
    if not isinstance(value, list):
        return value
    return [{key: text for key, text in message.items() if key not in KEYS} for message in value]


def _with_tools(messages: Messages, raw: Mapping[str, object]) -> Messages:
    """The messages with the tools that stand beside them.

    Raises:
        Unusable: they are no tools.
    """
    try:
        return with_tools(messages, raw.get(TOOLS))
    except ValueError as error:
        raise Unusable(f"{TOOLS}: {str(error)[:SHOWN_CHARS]}") from None


def derive_prompt(raw: Mapping[str, object], column: str, reasoning: bool = False) -> Messages:
    """The prompt of a row, which stands in `column`, with the tools beside it; `reasoning` as in `derive_pair`.

    Raises:
        Unusable: it is none, or something in it would be lost.
    """
    try:
        prompt = read_prompt(raw.get(column), reasoning)
    except Unusable as error:
        raise Unusable(f"{column}: {error}") from None
    return _with_tools(prompt, raw)


def read_prompt(value: object, reasoning: bool = False) -> Messages:
    """A prompt from text or messages; `reasoning`: that of earlier turns is left out, as templates do.

    Raises:
        Unusable: it is neither, or something in it would be lost.
    """
    read = _read(value, None)
    messages = _user(read) if isinstance(read, str) else read
    if not reasoning:
        _check_no_reasoning(messages, None)
    messages = _without_reasoning(messages)
    check_last(messages, None)
    return messages


def is_prompt(value: object) -> bool:
    """Whether a value can be read as a prompt."""
    try:
        read_prompt(value)
    except Unusable:
        return False
    return True


def check_last(messages: Messages, column: str | None) -> None:
    """Look at who speaks last in a prompt.

    Raises:
        Unusable: it is the assistant, so that there is nothing to answer.
    """
    if messages[-1]["role"] == "assistant":
        raise Unusable(_place(column, "ends with an assistant message"))


def _place(column: str | None, reason: str) -> str:
    return f"{column}: {reason}" if column else reason


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _read(value: object, column: str | None) -> str | Messages:
    """Text, or messages of texts by the keys that are known, the assistant's reasoning under its own key."""
    if isinstance(value, str):
        value = _from_text(value, column)
    if isinstance(value, str):
        if not value.strip():
            raise Unusable(_place(column, "empty"))
        return clean(value)
    if not isinstance(value, list) or not value:
        raise Unusable(_place(column, "neither text nor a list of messages"))
    return [_message(message, column) for message in value]


def _from_text(text: str, column: str | None) -> object:
    """The messages that a text is the JSON or the Python form of; any other text as it is."""
    bare = text.strip()
    if not (bare.startswith("[") and bare.endswith("]") and "role" in bare and "content" in bare):
        return text

    for parse in (json.loads, _literal):
        try:
            value = parse(bare)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        is_messages = isinstance(value, list) and any(isinstance(one, dict) and "role" in one for one in value)
        return value if is_messages else text

    # A model that was trained on it would answer with brackets and quotes.
    if bare.lstrip("[ \n").startswith("{"):
        raise Unusable(_place(column, f"text that looks like messages and cannot be read: {bare[:SHOWN_CHARS]!r}"))
    return text


def _literal(text: str) -> object:
    if len(text) > LITERAL_CHARS:
        raise ValueError("too long")
    return ast.literal_eval(text)


def _message(message: object, column: str | None) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise Unusable(_place(column, f"a message needs a role out of {', '.join(ROLES)}"))

    role = message["role"]
    # A table of messages has every key in every message; those that a message does not have are null there.
    stated = {key: value for key, value in message.items() if value not in (None, "", [], {})}
    beyond = _beyond(stated, role, column)
    lost = stated.keys() - {"role", "content"} - beyond.keys()
    if lost:
        raise Unusable(_place(column, f"a message of the {role} has `{min(lost)}`, which would be lost"))

    content = _content(message.get("content"), role, column)
    # Templates write a system message that is empty in another way than none; a call may stand without a text.
    if not content.strip() and role != "system" and CALLS not in beyond:
        raise Unusable(_place(column, f"a message of the {role} is empty"))
    return {"role": role, "content": content, **beyond}


def _beyond(stated: Mapping[str, object], role: str, column: str | None) -> dict[str, str]:
    """What a message has beyond role and content, as far as one of its role may have it.

    Raises:
        Unusable: its calls are none.
    """
    takes = {"assistant": (*KEYS, NAME), "tool": (NAME, CALL_ID)}.get(role, (NAME,))
    texts = {key: value for key, value in stated.items() if key in takes and isinstance(value, str)}
    found = {key: clean(text) for key, text in texts.items()}
    if role == "assistant" and CALLS in stated:
        try:
            found[CALLS] = calls_text(stated[CALLS])
        except ValueError as error:
            reason = f"a message of the assistant has {CALLS} that cannot be read: {str(error)[:SHOWN_CHARS]}"
            raise Unusable(_place(column, reason)) from None
    return found


def _content(value: object, role: str, column: str | None) -> str:
    """The text of a message: a string, or parts that are all text."""
    if isinstance(value, str):
        return clean(value)
    if value is None:
        return ""
    if not isinstance(value, list):
        raise Unusable(_place(column, f"the content of a message of the {role} is no text"))

    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise Unusable(_place(column, f"a message of the {role} has a part of type {kind}; only text can be used"))
        texts.append(part["text"])
    return clean("".join(texts))


def _whole(prompt: str | Messages | None, sides: Mapping[str, str | Messages], side: str, column: str) -> Messages:
    """The whole conversation of one side, answer included."""
    value = sides[side]
    if isinstance(value, str):
        before = _prompt_beside(prompt, sides, side, column)
        return [*before, {"role": "assistant", "content": value}]

    if value[-1]["role"] != "assistant":
        raise Unusable(f"{side}: its last message is not the assistant's")
    if value[0]["role"] == "assistant":
        return [*_prompt_beside(prompt, sides, side, column), *value]

    if prompt is not None and not _holds(value, prompt):
        raise Unusable(f"{side}: does not hold what stands in {column}")
    return value


def _prompt_beside(
    prompt: str | Messages | None, sides: Mapping[str, str | Messages], side: str, column: str
) -> Messages:
    """What stands before an answer that has no beginning of its own: the other side's, or the prompt."""
    (other,) = (value for name, value in sides.items() if name != side)
    if isinstance(other, list) and other[0]["role"] != "assistant":
        return other[:-1]
    if prompt is None:
        raise Unusable(f"{column}: missing, and {side} has only the answer")
    return _user(prompt) if isinstance(prompt, str) else prompt


def _holds(messages: Messages, prompt: str | Messages) -> bool:
    """Whether the prompt stands in a conversation: as a text somebody said to it, or as messages in a row."""
    if isinstance(prompt, str):
        return any(
            message["role"] != "assistant" and message["content"].strip() == prompt.strip() for message in messages
        )
    starts = range(len(messages) - len(prompt) + 1)
    return any(messages[start : start + len(prompt)] == prompt for start in starts)


def _common_beginning(chosen: Messages, rejected: Messages) -> Messages:
    """The messages that both begin with; the last one of either is its answer in any case."""
    count = 0
    while count < min(len(chosen), len(rejected)) - 1 and chosen[count] == rejected[count]:
        count += 1
    return chosen[:count]


def _check_one_answer(side: str, following: int) -> None:
    if following > 1:
        raise Unusable(
            f"{side}: {following} messages follow what chosen and rejected have in common; only a last answer is "
            "trained on while reference.train_on is `last`"
        )
