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
from dataclasses import dataclass

from rdpo.records import ROLES, SIDES, Messages, clean

LITERAL_CHARS = 1 << 20
"""Longest text that is read as Python's repr of messages."""
SHOWN_CHARS = 60


class Unusable(ValueError):
    """A row is no conversation that can be kept whole; the message says why."""


@dataclass(frozen=True)
class Pair:
    """A prompt, which ends with the user's or a tool's message, and the text of two answers to it."""

    prompt: Messages
    answers: dict[str, str]


def derive_pair(raw: Mapping[str, object], column: str) -> Pair:
    """The pair of a row whose prompt, if it has one of its own, stands in `column`.

    Raises:
        Unusable: something is missing, contradicts itself, or would be lost.
    """
    check_columns(raw)
    prompt = None if raw.get(column) is None else _read(raw[column], column)
    sides = {side: _read(raw.get(side), side) for side in SIDES}
    wholes = {side: _whole(prompt, sides, side, column) for side in SIDES}

    shared = _common_beginning(*wholes.values())
    for side, messages in wholes.items():
        _check_one_answer(side, len(messages) - len(shared))
    if not shared:
        raise Unusable(f"{column}: chosen and rejected have no beginning in common, and there is no prompt beside them")
    check_last(shared, column)
    return Pair(shared, {side: messages[-1]["content"] for side, messages in wholes.items()})


def check_columns(raw: Mapping[str, object]) -> None:
    """Look for columns that belong to the conversation and have no place in it here.

    Raises:
        Unusable: there is one.
    """
    if raw.get("tools"):
        raise Unusable("tools: the tools that the assistant may call would be lost; such rows cannot be used yet")


def read_prompt(value: object) -> Messages:
    """A prompt from text or messages.

    Raises:
        Unusable: it is neither, or something in it would be lost.
    """
    read = _read(value, None)
    messages = _user(read) if isinstance(read, str) else read
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
    """Text, or messages with nothing but role and content."""
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


def _message(message: object, column: str | None) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise Unusable(_place(column, f"a message needs a role out of {', '.join(ROLES)}"))

    role = message["role"]
    # A table of messages has every key in every message; those that a message does not have are null there.
    lost = [key for key, value in message.items() if key not in ("role", "content") and value not in (None, "", [], {})]
    if lost:
        raise Unusable(_place(column, f"a message of the {role} has `{lost[0]}`, which would be lost"))

    content = _content(message.get("content"), role, column)
    # Templates write a system message that is empty in another way than none.
    if not content.strip() and role != "system":
        raise Unusable(_place(column, f"a message of the {role} is empty"))
    return {"role": role, "content": content}


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
            f"{side}: {following} messages follow what chosen and rejected have in common; only a last answer can be "
            "trained on"
        )
