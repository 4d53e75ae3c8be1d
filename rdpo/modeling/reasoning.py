"""What a model thinks before it answers: how its chat template writes that, and how it is told from the answer.

A template that has the model think writes the thoughts of an assistant's message between two marks, and names the key
of the message that holds them (Qwen3, gpt-oss), or finds them in the content; or it leaves them out of conversations
that are answered, and only begins them where it asks (DeepSeek-R1). The marks are found by asking the template.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from rdpo.modeling.template import PROBE, Template, Unfit, probes, variables

KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant's message under which templates and data sets have its reasoning."""
THINKING: tuple[dict[str, bool], ...] = ({"enable_thinking": True}, {"thinking": True}, {})
"""Arguments under which a template may ask for reasoning: what models call it, then its defaults."""
REASON = "reason5b1f"
"""Stands for any reasoning; no template writes this word by itself."""
MARKS = ("<think>", "</think>")
"""What most models put around their reasoning."""
OPENED = re.compile(rf"{MARKS[0]}(\s*)\Z")


class Unended(ValueError):
    """An answer that ends inside its reasoning."""


@dataclass(frozen=True)
class ReasoningForm:
    """How reasoning and answer stand behind the place where a template asks.

    The text there is `before`, the reasoning, `behind`, the answer; `opened` is what the template asks with already of
    the mark that begins the reasoning, and `without` what it writes there before an answer without any. `key` is that
    of the message with the reasoning; None: the content holds both. `written`: whether the template writes the
    reasoning into conversations that are answered.
    """

    before: str
    behind: str
    key: str | None = None
    opened: str = ""
    without: str = ""
    written: bool = True

    @property
    def closing(self) -> str:
        """The mark behind the reasoning, without the blanks around it."""
        return self.behind.strip()

    def message(self, reasoning: str, answer: str) -> dict[str, str]:
        """The assistant's message with both, as the template reads it."""
        if self.key:
            return {"role": "assistant", "content": answer, self.key: reasoning}
        thought = self.opened + self.before + reasoning + self.behind if self.written else ""
        return {"role": "assistant", "content": thought + answer}

    def split(self, text: str) -> tuple[str, str]:
        """Reasoning and answer of what a model wrote; no reasoning where the model began none.

        Raises:
            Unended: the reasoning does not end.
        """
        opening = self.before.strip()
        reasoning, closed, answer = text.partition(self.closing)
        if closed:
            return reasoning.strip().removeprefix(opening).strip(), answer.strip()
        if not opening or text.lstrip().startswith(opening):
            raise Unended("the answer ends inside its reasoning")
        return "", text.strip().removeprefix(self.without.strip()).strip()


def reasoning_template(template: Template) -> tuple[Template, ReasoningForm]:
    """The template with the arguments that ask for reasoning, and how it writes that.

    Raises:
        Unfit: it has no place for reasoning where a model that is asked would write it.
    """
    known, given = variables(template.tokenizer), template.arguments
    for added in THINKING:
        if not added.keys() <= known - given.keys():
            continue
        # What was looked at under other arguments is not known under these.
        asking = replace(template, arguments={**added, **given}, known_shapes=set())
        if form := _form(asking):
            return asking, form
    raise Unfit("it does not write reasoning behind the place where it asks, in any way that is known here")


def _form(template: Template) -> ReasoningForm | None:
    asked = template.asking(probes(("user",)))
    mark = OPENED.search(asked)
    opened = mark[0] if mark else ""
    plain = _answered(template, {"content": PROBE})
    without = plain.removeprefix(asked).partition(PROBE)[0] if plain.startswith(asked) else ""

    for key in KEYS:
        if form := _written(template, asked, {"content": PROBE, key: REASON}):
            return replace(form, key=key, opened=opened, without=without)

    # Of a template that knows of thinking the marks are its own, whatever most models have.
    if MARKS[0] not in template.tokenizer.get_chat_template() and thinks(template):
        return None
    inline = f"{MARKS[0]}\n{REASON}\n{MARKS[1]}\n\n{PROBE}"
    if form := _written(template, asked, {"content": inline}):
        return replace(form, opened=opened, without=without)
    if mark:
        # As models write that are trained in this way: the mark of the end stands in the same blanks, and a line free.
        return ReasoningForm("", mark[1] + MARKS[1] + 2 * mark[1], opened=opened, written=False)
    return None


def thinks(template: Template) -> bool:
    """Whether a template knows of models that think: of the usual marks, or of an argument that asks for reasoning."""
    names = {name for arguments in THINKING for name in arguments}
    return MARKS[0] in template.tokenizer.get_chat_template() or not variables(template.tokenizer).isdisjoint(names)


def _answered(template: Template, message: dict[str, Any]) -> str:
    """What the template writes of a question with this answer; nothing where it refuses it."""
    try:
        return template.text([*probes(("user",)), {"role": "assistant", **message}])
    except ValueError:
        return ""


def _written(template: Template, asked: str, message: dict[str, Any]) -> ReasoningForm | None:
    """How the template writes an assistant's message with reasoning, if that continues what it asks with."""
    whole = _answered(template, message)
    before, found, rest = whole.removeprefix(asked).partition(REASON)
    behind, answered, _ = rest.partition(PROBE)
    if not (whole.startswith(asked) and found and answered and behind.strip()):
        return None
    return ReasoningForm(before, behind)


def split_inline(text: str) -> tuple[str, str]:
    """Reasoning and answer of a text that has both between the marks of most models; else no reasoning, and the text.

    Raises:
        Unended: the reasoning does not end.
    """
    return ReasoningForm(MARKS[0], MARKS[1]).split(text) if text.lstrip().startswith(MARKS[0]) else ("", text)
