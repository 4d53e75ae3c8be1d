"""Messages whole: tool calls and tools that may be called, as they are stored, and as templates and servers read them.

A message is a table of texts. Beyond `role` and `content` the assistant's may have `tool_calls` (JSON of a list, in
OpenAI's form), a tool's `tool_call_id`, and any of them a `name`. The tools of a conversation stand in it as a message
of the role `tools`, behind the system message, if there is one: so they go wherever the messages go.

Data sets in Arrow's form write null for a key that another row has. So keys without a value are taken for absent, in
calls and in the schemas of tools too, as TRL does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rdpo.records import BEYOND, Messages, clean

TOOLS = "tools"
"""The role of the message that holds the tools of a conversation, and the column of a data set with them."""
CALLS, NAME, CALL_ID = BEYOND


def calls_text(calls: object) -> str:
    """The calls of an assistant's message as they are stored.

    Raises:
        ValueError: they are no list of calls with the names of functions.
    """
    given = json.loads(calls) if isinstance(calls, str) else calls
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise ValueError("no list of calls")
    return _json([_call(one) for one in given])


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """One call, its arguments as a table: templates write them, and servers are sent them as text."""
    call = _without_null(call)
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a call without the name of a function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # JSON in OpenAI's form.
        arguments = _without_null(json.loads(arguments or "{}"))
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {function['name']} are no table")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def tools_message(tools: object) -> dict[str, str]:
    """The message that holds the tools of a conversation: a list of JSON schemas, or JSON of one.

    Raises:
        ValueError: it is none.
    """
    given = json.loads(tools) if isinstance(tools, str) else tools
    # A data set may hold each of them as a text.
    listed = [json.loads(one) if isinstance(one, str) else one for one in given] if isinstance(given, list) else None
    if not listed or not all(isinstance(one, dict) and tool_name(one) for one in listed):
        raise ValueError("no list of JSON schemas with the names of functions")
    return {"role": TOOLS, "content": _json(_without_null(listed))}


def tool_name(tool: dict[str, Any]) -> str:
    """The name of a tool, by its schema; empty if it has none."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def with_tools(messages: Messages, tools: object) -> Messages:
    """The messages with the tools that a row has, if it has any.

    Raises:
        ValueError: they are no tools.
    """
    if not tools or tools == "[]":
        return messages
    place = 1 if messages[0]["role"] == "system" else 0
    return [*messages[:place], tools_message(tools), *messages[place:]]


def is_plain(messages: Iterable[dict[str, Any]]) -> bool:
    """Whether messages have nothing but roles and contents, and no tools."""
    return not any(message["role"] == TOOLS or any(message.get(key) for key in BEYOND) for message in messages)


def tools_of(messages: Messages) -> list[dict[str, Any]] | None:
    """The schemas of the tools of a conversation; None if it has none."""
    texts = [message["content"] for message in messages if message["role"] == TOOLS]
    return [tool for text in texts for tool in json.loads(text)] or None


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a message: tables with the `name` and the `arguments` of a function, as templates read them."""
    calls: list[dict[str, Any]] = json.loads(message.get(CALLS) or "[]")
    return calls


def template_form(messages: Messages) -> list[dict[str, Any]]:
    """The messages as chat templates read them, without the tools, which are an argument of their own."""
    return [_open(message) for message in messages if message["role"] != TOOLS]


def server_form(messages: Messages) -> list[dict[str, Any]]:
    """The messages as OpenAI's protocol has them, without the tools: arguments of calls are JSON."""
    found = template_form(messages)
    for message in found:
        for call in message.get(CALLS, ()):
            function = call.get("function", call)
            function["arguments"] = _json(function["arguments"])
    return found


def _open(message: dict[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in message.items() if value is not None}
    return {**found, CALLS: calls_of(message)} if message.get(CALLS) else found


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(one) for key, one in value.items() if one is not None}
    return [_without_null(one) for one in value] if isinstance(value, list) else value


def _json(value: object) -> str:
    return clean(json.dumps(value, ensure_ascii=False))
