"""What a chat template writes, as text: up to where the assistant answers, and of a whole conversation.

A template is asked to write a conversation that somebody still has to answer, or one that is answered. The two need not
begin alike: templates of models that think open a `<think>` block for the first and write an empty one, or none, into
the second; others name a channel before the answer only. What a model is trained on, and asked with, is here always
the beginning of the answered conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from itertools import count
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import htmlsafe_json_dumps

from rdpo.config import TEMPLATE_DATE
from rdpo.errors import InputError
from rdpo.messages import CALLS, NAME, TOOLS, calls_of, template_form, tool_name, tools_of
from rdpo.records import Messages, digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rdpo.modeling.weights import ModelRef

PROBE = "answer5b1f"
"""Stands for any answer; no template writes this word by itself."""
PROBE_NUMBER = 581_581_000
"""Above this stand numbers that no template writes by itself."""
NO_THINKING: tuple[dict[str, bool], ...] = ({}, {"enable_thinking": False}, {"thinking": False})
"""Arguments under which a template may ask for an answer without thoughts: its defaults, and what models call it."""
COMMENT = re.compile(r"{#.*?#}", re.DOTALL)
GENERATION = re.compile(r"{%[-+]?\s*(?:end)?generation\s*[-+]?%}")
"""A tag of transformers' own, around what an assistant says."""
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}) | {
    *("raise_exception", "strftime_now", "tojson", "namespace", "range")
}
"""Names in chat templates that are no arguments of a user's."""
_GRAMMAR = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
DATE_FUNCTION = re.compile(r"\bstrftime_now\s*\(")


class Unfit(ValueError):
    """The template does not write an answer so that it could be trained on."""


@dataclass(frozen=True)
class Opening:
    """What a template writes of a conversation before its answer.

    `blanks` are those between `text` and the answer that tokenizers read as part of the answer's first word.
    """

    messages: Messages
    text: str
    blanks: str


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template, rendered by transformers in a sandbox; `day` is today for those that ask.

    `arguments` are further ones that it gets at every rendering, such as `enable_thinking`.
    """

    tokenizer: PreTrainedTokenizerBase
    day: date = TEMPLATE_DATE
    arguments: Mapping[str, Any] = field(default_factory=dict)
    known_shapes: set[str] = field(default_factory=set, compare=False, repr=False)

    def asking(self, messages: Messages, **arguments: Any) -> str:
        """What it writes of a conversation that is to be answered, by its own account.

        Raises:
            ValueError: it refuses the conversation, or leaves out a part of it.
        """
        text = self.text(messages, add_generation_prompt=True, **arguments)
        self.check_kept(messages, text, lambda tried: self.text(tried, add_generation_prompt=True, **arguments))
        return text

    def opening(self, messages: Messages) -> Opening:
        """What it writes of a conversation before the assistant's answer, whatever that is.

        Raises:
            ValueError: it refuses the conversation, or leaves out a part of it.
        """
        before = self._before(messages)
        self.check_kept(messages, before, self._before)
        text = before.rstrip(" ")
        if text == before or before == self.text(messages, add_generation_prompt=True):
            return Opening(messages, before, "")
        return Opening(messages, text, before[len(text) :])

    def answered(self, opening: Opening, answer: str) -> str:
        """What it writes of a conversation with its answer.

        Raises:
            ValueError: it refuses the answer, or writes it in another way than it stands there.
        """
        whole = self.text(_answered(opening.messages, answer))
        before = opening.text + opening.blanks
        if whole.startswith(before + answer):
            return whole
        if answer.strip() != answer and whole.startswith(before + answer.strip()):
            raise ValueError("the chat template strips the blanks around an answer, which this one has")
        raise ValueError("the chat template leaves out or changes a part of the answer")

    def ending(self) -> str:
        """What it writes behind an answer.

        Raises:
            ValueError: it does not write the answer.
        """
        return self.text(_answered(probes(("user",)), PROBE)).rpartition(PROBE)[2]

    def fit_opening(self) -> str:
        """What it writes before an answer, beyond what a model is given when it is asked; often nothing.

        A model that was trained to answer behind it can be asked there: the template asks there itself, or it writes
        more after the place where it asks.

        Raises:
            Unfit: it writes the answer somewhere else, or not at all.
        """
        single, several = probes(("user",)), probes(("user", "assistant", "user"))
        found = self._behind_asking(self.opening(single))
        try:
            later = self.opening(several)
        except ValueError:
            # Whether it takes several turns is seen with the rows that have some.
            return found
        self._behind_asking(later)
        return found

    def _behind_asking(self, opening: Opening) -> str:
        """What stands before an answer, less what the template asks with by default."""
        before = opening.text + opening.blanks
        asked = [
            self.text(opening.messages, add_generation_prompt=True, **{**arguments, **self.arguments})
            for arguments in NO_THINKING
        ]
        shared = shared_length(asked[0], before)
        if not any(before.startswith(text) for text in asked):
            raise Unfit(
                f"asked with it, a model begins its answer behind {asked[0][shared:]!r}; where the answer is given, "
                f"the template writes {(before[shared:] + PROBE)!r} there"
            )
        return before[shared:]

    def _before(self, messages: Messages) -> str:
        before, found, _ = self.text(_answered(messages, PROBE)).rpartition(PROBE)
        if not found:
            raise ValueError("the chat template leaves out the assistant's answer")
        return before

    def text(self, messages: Messages, **arguments: Any) -> str:
        """What it writes of messages, with further arguments over its own; nothing is checked.

        Raises:
            ValueError: it refuses them.
        """
        passed = {"strftime_now": self.day.strftime, **self.arguments, **arguments}
        if tools := tools_of(messages):
            passed["tools"] = tools
        try:
            text = self.tokenizer.apply_chat_template(template_form(messages), tokenize=False, **passed)
        except Exception as error:
            # A template may raise whatever its author chose.
            raise ValueError(str(error) or type(error).__name__) from None
        return str(text)

    def check_kept(self, messages: Messages, text: str, render: Callable[[Messages], str] | None = None) -> None:
        """Look for every message in what was written of the conversation.

        Args:
            messages: the conversation.
            text: what the template wrote of it.
            render: how it did so; by default the whole conversation as it is.

        Raises:
            ValueError: one is missing, changed, or not in its place.
        """
        tried = likenesses(messages)
        shape = digest([message for message in tried if message["role"] != TOOLS])
        if shape not in self.known_shapes:
            # Words that stand nowhere else tell more than a short message, or an argument of one letter, does.
            _check_in_order(tried, (render or self.text)(tried))
            self.known_shapes.add(shape)
        check_written(messages, text)


def template_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of what a template wrote; a BOS that it and the tokenizer both put there stands once."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids.pop(0)
    return ids


def reads_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer's chat template asks for today's date."""
    return bool(tokenizer.chat_template and DATE_FUNCTION.search(COMMENT.sub("", tokenizer.get_chat_template())))


def variables(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Names of what a tokenizer's chat template reads: its arguments, the conversation, special tokens."""
    return meta.find_undeclared_variables(_parsed(tokenizer))


def _set_inside(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {name.name for name in _parsed(tokenizer).find_all(nodes.Name) if name.ctx == "store"}


def _parsed(tokenizer: PreTrainedTokenizerBase) -> nodes.Template:
    try:
        return _GRAMMAR.parse(GENERATION.sub("", tokenizer.get_chat_template()))
    except TemplateSyntaxError:
        # transformers says what is wrong with it, as soon as it is rendered.
        return nodes.Template([])


def check_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], where: str) -> None:
    """Look for every argument in the chat template, which would ignore others without a word.

    Raises:
        InputError: it reads none of that name, or one that is not the user's to give.
    """
    takes = variables(tokenizer) - RESERVED - set(tokenizer.special_tokens_map)
    for name in arguments:
        if name not in takes:
            # Names that it sets itself, in one branch or another, are mostly no arguments.
            named = sorted(takes - _set_inside(tokenizer)) or ["none"]
            raise InputError(f"{where}: the chat template reads no argument {name!r}; it reads {', '.join(named)}")


def date_settings(model: ModelRef, day: date) -> dict[str, Any]:
    """The day, where what a model reads depends on it."""
    return {"date": day.isoformat()} if reads_date(model.tokenizer()) else {}


def _answered(messages: Messages, answer: str) -> Messages:
    return [*messages, {"role": "assistant", "content": answer}]


def probes(roles: tuple[str, ...]) -> Messages:
    """A message of each role, with words that stand nowhere else."""
    return likenesses([{"role": role, "content": PROBE} for role in roles])


def likenesses(messages: Messages) -> Messages:
    """Messages of the same shape: the same roles, calls and names of arguments, with other words and numbers.

    No word of them, and no number, stands anywhere else.
    """
    fresh = count(1)
    return [_likeness(message, fresh) for message in messages]


def _likeness(message: dict[str, str], fresh: Iterator[int]) -> dict[str, str]:
    if message["role"] == TOOLS:
        # What a template makes of a schema is its own affair.
        return message
    found = {**message, "content": _word(next(fresh)) if message["content"].strip() else ""}
    calls = calls_of(message)
    for call in calls:
        function = call.get("function", call)
        function["arguments"] = _other_values(function["arguments"], fresh)
    return {**found, CALLS: json.dumps(calls)} if calls else found


def _other_values(value: Any, fresh: Iterator[int]) -> Any:
    if isinstance(value, dict):
        return {key: _other_values(one, fresh) for key, one in value.items()}
    if isinstance(value, list):
        return [_other_values(one, fresh) for one in value]
    if isinstance(value, str):
        return _word(next(fresh))
    if isinstance(value, bool) or value is None:
        return value
    return type(value)(PROBE_NUMBER + next(fresh))


def _word(number: int) -> str:
    return f"message{number}x5b1f"


def check_written(messages: Messages, text: str) -> None:
    """Look for all of a conversation in what a template wrote of it.

    Raises:
        ValueError: something is missing, changed, or not in its place.
    """
    for tool in tools_of(messages) or ():
        if tool_name(tool) not in text:
            raise ValueError(f"the chat template leaves out the tool {tool_name(tool)}")
    _check_in_order(messages, text)


def _check_in_order(messages: Messages, text: str) -> None:
    place = 0
    for number, message in enumerate(messages):
        if message["role"] == TOOLS:
            continue
        # Some templates write the first system message into the user's last one; nothing is lost by that.
        is_first_system = number == 0 and message["role"] == "system"
        for forms in _written_forms(message):
            ends = [
                text.find(form, 0 if is_first_system else place) + len(form) for form in forms if form in text[place:]
            ]
            if not ends:
                raise ValueError(f"the chat template leaves out or changes a message of the {message['role']}")
            place = place if is_first_system else min(ends)


def _written_forms(message: dict[str, Any]) -> Iterator[set[str]]:
    """What must be found of a message, one after the other, each in one of the forms that templates write."""
    # Whose words a tool's are, its place says.
    if message.get(NAME) and message["role"] != "tool":
        yield {message[NAME]}
    forms = {message["content"].strip()}
    # Some templates write a tool's answer as a JSON string.
    if message["role"] == "tool":
        forms.add(json.dumps(message["content"], ensure_ascii=False)[1:-1])
    yield forms

    for call in calls_of(message):
        function = call.get("function", call)
        yield {function["name"]}
        for name, value in function["arguments"].items():
            yield {name}
            yield _value_forms(value)


def _value_forms(value: object) -> set[str]:
    """The forms in which templates write the value of an argument: as JSON of one kind or another, or as Python's."""
    plain = {json.dumps(value, ensure_ascii=ascii) for ascii in (True, False)}
    tight = {json.dumps(value, ensure_ascii=False, separators=(",", ":")), str(value)}
    # In HTML's escapes, as Jinja's own filter writes it; inside a JSON string, as a text.
    escaped = {str(htmlsafe_json_dumps(value))}
    return {form.strip('"') if isinstance(value, str) else form for form in plain | tight | escaped}


def shared_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))
