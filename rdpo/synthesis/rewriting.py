"""A segment of an answer written anew, and the answer's other words around it (SAPO, arXiv 2405.20830).

Of an answer of L tokens a segment of n = min(wanted, L) is left out. It begins after s tokens, with s drawn uniformly
from 0 to max(L - n - 2, 0), as in the authors' program. A model goes on from the first s tokens; what it writes stands
before the tokens from s + n on. Where the model ends its answer within the segment, nothing follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rdpo.modeling.chat import Chat
    from rdpo.synthesis.engine import Generation


@dataclass(frozen=True)
class Cut:
    """An answer without a segment of `length` tokens: what stands before it and behind it, as text and as tokens."""

    before: str
    behind: str
    length: int
    ids_before: list[int]
    ids_behind: list[int]


def cut_answer(answer: str, chat: Chat, wanted: int, draw: Callable[[int], float]) -> Cut:
    """Leave out a segment of `wanted` tokens, at a place where tokens and text of both other parts are the answer's.

    Args:
        answer: a text with at least one token.
        chat: of the model that writes the segment.
        wanted: tokens of the segment.
        draw: a random number for each place.

    Raises:
        ValueError: there is no such place.
    """
    ids = chat.text_ids(answer)
    length = min(wanted, len(ids))
    places = range(max(len(ids) - length - 2, 0) + 1)
    # In a drawn order, so that the first exact place is drawn uniformly from all exact ones.
    for start in sorted(places, key=draw):
        cut = _cut_at(answer, ids, start, length, chat)
        if cut:
            return cut
    raise ValueError(f"no {length} tokens of the answer can be taken out of it exactly")


def _cut_at(answer: str, ids: list[int], start: int, length: int, chat: Chat) -> Cut | None:
    """The answer cut after `start` tokens; None where a part of it is not the text or the tokens that it was."""
    before, through = chat.decoded(ids[:start]), chat.decoded(ids[: start + length])
    if not (answer.startswith(through) and through.startswith(before)):
        return None
    # The model is given text, and has to read the answer's own tokens.
    if chat.text_ids(before) != ids[:start] or chat.decoded(ids) != answer:
        return None
    return Cut(before, answer[len(through) :], length, ids[:start], ids[start + length :])


def joined(cut: Cut, said: Generation, finish_reason: str, chat: Chat) -> Generation:
    """The whole answer, from the segment that was said; `finish_reason`: how the original ended.

    Raises:
        ValueError: the segment's tokens are another text between the others than alone.
    """
    text = cut.before + said.text
    if said.finish_reason != "length":
        return replace(said, text=text)

    text += cut.behind
    if chat.decoded([*cut.ids_before, *said.token_ids, *cut.ids_behind]) != text:
        raise ValueError("the tokens of the new segment do not give its text between the others")
    drawn = (*said.drawn, *cut.ids_behind) if said.drawn else ()
    # Without words behind it the answer was cut off, whatever the original did.
    return replace(said, text=text, drawn=drawn, finish_reason=finish_reason if cut.ids_behind else "length")
