"""Where a chat template lets a user's first message begin and end, found by asking it to write some.

A model that is given what stands before the message goes on with one, as users write them (Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdpo.modeling.messages import specials
from rdpo.modeling.template import PROBE, Template, Unfit, shared_length, template_ids
from rdpo.records import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAID = ("message0x5b1f", 'Is “5b1f” {{ one }} of <these>, or "two" & \\more?\n\n    3 * 4 = 12\nWhy')
"""Two messages of a user's: a word, and what a template might escape or take for a part of itself."""


@dataclass(frozen=True)
class UserTurn:
    """What a template writes around a user's first message.

    `before` is the text before it, up to blanks that tokenizers read as part of the message's first word, and `ids` are
    its tokens. The message ends where the text `end` begins, unless that is empty, and at the token `end_id`, unless
    that is None.
    """

    before: str
    ids: tuple[int, ...]
    end: str
    end_id: int | None


def user_turn(template: Template, system: str | None = None) -> UserTurn:
    """The place of a user's first message, behind a system message where there is one.

    Raises:
        Unfit: nothing stands before or behind it by which a model knows a user's message.
        ValueError: the template refuses the conversation, or leaves out or changes a part of it.
    """
    tokenizer = template.tokenizer
    places = {_around(template, system, said) for said in SAID}
    if len(places) > 1:
        raise Unfit("what it writes around a user's message depends on the message")
    [(before, behind)] = places
    if not _own(before, tokenizer, system):
        raise Unfit("it writes nothing before a user's message by which a model would know that a user begins to speak")

    begun = before.rstrip(" ")
    ids = template_ids(tokenizer, begun)
    for said in SAID:
        if template_ids(tokenizer, before + said)[: len(ids)] != ids:
            raise Unfit("its tokenizer joins the beginning of a user's message to what stands before it")
    return UserTurn(begun, tuple(ids), *_end(tokenizer, behind))


def _around(template: Template, system: str | None, said: str) -> tuple[str, str]:
    """What stands before and behind a user's message in any case: where it is to be answered, and where it is."""
    given: Messages = [{"role": "system", "content": system}] if system else []
    messages: Messages = [*given, {"role": "user", "content": said}]
    before, behind = _divided(template.asking(messages), said)
    if system and system.strip() not in before:
        raise Unfit("it does not write the system message before the user's")

    answered = template.text([*messages, {"role": "assistant", "content": PROBE}]).partition(PROBE)[0]
    before_answered, behind_answered = _divided(answered, said)
    if before_answered != before:
        raise Unfit("what it writes before a user's message depends on whether that is answered")
    return before, behind[: shared_length(behind, behind_answered)]


def _divided(text: str, said: str) -> tuple[str, str]:
    """What stands before and behind a message in a text.

    Raises:
        Unfit: it does not stand there once.
    """
    if text.count(said) != 1:
        raise Unfit("it leaves out or changes a user's message, or writes it more than once")
    before, _, behind = text.partition(said)
    return before, behind


def _own(before: str, tokenizer: PreTrainedTokenizerBase, system: str | None) -> str:
    """What stands before a user's message, less what begins every text and the system message."""
    if tokenizer.bos_token:
        before = before.replace(tokenizer.bos_token, "")
    return before.replace(system.strip(), "").strip() if system else before.strip()


def _end(tokenizer: PreTrainedTokenizerBase, behind: str) -> tuple[str, int | None]:
    """The text and the token with which a user's message ends: the first token that is no text, and what is before it.

    Raises:
        Unfit: there is neither.
    """
    # Some tokenizers have blanks among them, which end nothing.
    marks = {token: text for token, text in added_tokens(tokenizer).items() if text.strip()}
    standing = [(behind.index(text), -len(text), token) for token, text in marks.items() if text in behind]
    # Of several that begin at one place the longest is the one that the tokenizer reads.
    place, _, token = min(standing, default=(len(behind), 0, None))
    text = behind[:place].rstrip()
    if token is None and not text:
        raise Unfit("it writes nothing behind a user's message, so that none would end")
    return text, token


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokens that a tokenizer reads as a whole wherever they stand, by id: special ones, and others added to it."""
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    return {**dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)), **added}


def unspoken_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that are left out where others become text."""
    return frozenset(specials(tokenizer))
