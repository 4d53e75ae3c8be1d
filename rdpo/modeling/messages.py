"""Token ids of an answer that is more than one text: one that calls tools, or several messages with results between.

They are those of the template's own text of the whole conversation. What the assistant writes counts: each of its
messages from the place where it is asked to the token that ends its turn. All else is read and does not count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdpo.modeling.masking import masked
from rdpo.modeling.template import check_written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rdpo.modeling.chat import Chat
    from rdpo.modeling.template import Opening
    from rdpo.records import Messages


def answer_ids(chat: Chat, opening: Opening, prompt: list[int], answer: Messages) -> list[int]:
    """Token ids of an answer behind its prompt; those that do not count as in `rdpo.modeling.masking`.

    Raises:
        ValueError: the template writes it, or the prompt before it, in another way, or nothing ends its turns.
    """
    if chat.reasoning:
        raise ValueError("calls of tools cannot be read together with reasoning")
    if not chat.tokenizer.is_fast:
        raise ValueError("its tokenizer does not say where tokens stand in a text, as calls of tools need")
    if mark := _mark_in(chat, answer):
        raise ValueError(f"the answer holds {mark!r}, which is a token of the template's own")
    whole = chat.template.text([*opening.messages, *answer])
    chat.template.check_kept([*opening.messages, *answer], whole)
    ids, starts = _with_places(chat, whole)
    if not whole.startswith(opening.text) or ids[: len(prompt)] != prompt:
        raise ValueError("the chat template writes the prompt in another way before an answer that calls tools")

    found: list[int] = []
    place = len(prompt)
    for number, message in enumerate(answer):
        if message["role"] != "assistant":
            continue
        first = _asked_at(chat, [*opening.messages, *answer[:number]], whole, starts)
        end = next((place + 1 for place in range(first, len(ids)) if ids[place] in chat.stop_ids), None)
        if end is None:
            raise ValueError("no token that ends generation stands behind a call of tools in the chat template")
        _check_turn(answer, number, whole, starts[first], [*starts, len(whole)][end])
        found += [*masked(ids[place:first]), *ids[first:end]]
        place = end
    return found


def _mark_in(chat: Chat, messages: Messages) -> str | None:
    """A special token that stands in messages as text: behind the template's it would be taken for one of its own."""
    texts = [text for message in messages for text in message.values() if isinstance(text, str)]
    marks = specials(chat.tokenizer).values()
    return next((mark for mark in marks if any(mark in text for text in texts)), None)


def specials(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens of a tokenizer by id: also those without a role, as most of Llama 3's are."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return named | {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}


def _with_places(chat: Chat, whole: str) -> tuple[list[int], list[int]]:
    """Ids of what a template wrote, and where in the text each token begins."""
    encoded = chat.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts = list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]
    # A BOS that stands there twice.
    doubled = len(ids) - len(chat.written_ids(whole))
    return ids[doubled:], starts[doubled:]


def _asked_at(chat: Chat, before: Messages, whole: str, starts: list[int]) -> int:
    """The place of the first token that the assistant writes behind some messages.

    Raises:
        ValueError: the template writes them in another way in the whole, or a token reaches across.
    """
    text = chat.template.opening(before).text
    if not whole.startswith(text) or len(text) not in starts:
        raise ValueError("the chat template writes messages in another way once others follow them")
    return starts.index(len(text))


def _check_turn(answer: Messages, number: int, whole: str, begins: int, ends: int) -> None:
    """Look for a message within its turn, and for all that follow it behind.

    Raises:
        ValueError: the turn does not end where the message does.
    """
    try:
        check_written(answer[number : number + 1], whole[begins:ends])
        check_written(answer[number + 1 :], whole[ends:])
    except ValueError:
        raise ValueError("the chat template ends a call of tools by no token that ends generation") from None
