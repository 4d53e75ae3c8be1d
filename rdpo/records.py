"""Row identity: what makes two rows the same, and which random draws belong to a row.

A row is a plain dictionary. `prompt_id` is a hash of the conversation, so that a rerun, a retry or
a resumed run meets the same ids; `question_id` is one of what the conversation asks, so that one question
is never both trained on and held out; every random draw is a function of (seed, prompt_id, role), so
that a row's text does not depend on its neighbours or on the order of arrival. A row that cannot
go on carries the reason in its `dropped` column and is stored in the stage's dropped table.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

Messages = list[dict[str, Any]]
"""Tables of texts: `role`, `content`, and what `rdpo.messages` knows beyond them, which may be None."""
Row = dict[str, Any]
BEYOND = ("tool_calls", "name", "tool_call_id")
"""Keys that a message may have beyond its role and content."""

ID_COLUMN = "prompt_id"
"""The column with a row's id."""
QUESTION = "question_id"
"""The column with the identity of the question that a row's prompt asks, before any template."""
HELDOUT = "heldout"
"""The split of prompts that nothing is trained on, and the column of pairs that are held out of training."""
SIDES = ("chosen", "rejected")
"""The two answers of a preference pair, in the names of its columns."""
SCORE_COLUMNS = ("chosen_scores", "rejected_scores", "others_scores")
"""The columns of pairs with the scores by every reward, also those of weight 0. Nothing after the pairs depends on
them: training goes by `reward_gap`."""
DRAWN = "_drawn"
"""Behind the name of an answer: the column with the tokens that it was drawn as."""
VOICE = "_voice"
"""Behind the name of an answer: the column with the voice that spoke it, where it was drawn."""
OTHERS = "others"
"""What the columns of a group are called by, in the place of a side: each has a list over the answers between the
chosen and the rejected one, in the order of preference."""
DRAWN_COLUMNS = tuple(f"{side}{DRAWN}" for side in (*SIDES, OTHERS))
SHOWN_CHARS = 4000
ROLES = ("system", "user", "assistant", "tool")
TRAIN = "train"
SPLITS = {
    **dict.fromkeys((HELDOUT, "test", "validation", "val", "valid", "dev", "eval", "held-out", "held_out"), HELDOUT),
    # UltraFeedback's names, which others took over.
    **dict.fromkeys(("test_prefs", "test_sft", "test_gen"), HELDOUT),
    **dict.fromkeys((TRAIN, "train_prefs", "train_sft", "train_gen", "training"), TRAIN),
}
"""What splits are called elsewhere, in small letters."""
# What moves a terminal's cursor, turns the direction of writing, or cannot be seen or encoded; line breaks and tabs are
# none of these, nor are the joiners that scripts and emoji need.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)

UNSEEN_INSIDE_WORDS = "\u00ad\u200b\u2060\ufeff"
"""Places where a line may or may not be broken, and the mark of the order of bytes."""
SAME_IN_MEANING = {"<compat>", "<wide>", "<narrow>", "<noBreak>", "<initial>", "<medial>", "<final>", "<isolated>"}
"""Decompositions of Unicode by which only the shape of a character differs."""


def digest(*parts: object) -> str:
    """32 hexadecimal digits that depend on every part and on their order (JSON-serialisable parts)."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # Half a character, left of text that was cut, has an identity like any other.
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Fingerprint(str):
    """A hash of what a stage reads; `former` makes the one that earlier versions took of the same content.

    Settings on file hold one of the two, as plain text.
    """

    former: Callable[[], str]

    def __new__(cls, text: str, former: Callable[[], str] | None = None) -> Fingerprint:
        """The hash itself; by default earlier versions took the same."""
        made = super().__new__(cls, text)
        made.former = former or (lambda: text)
        return made

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """On file and in other processes it is text."""
        return (str, (str(self),))


def prompt_id(messages: Messages) -> str:
    """Identity of a prompt: a hash of its messages' roles and contents, and of what they have beyond these."""
    return digest([[message["role"], message["content"], *_beyond(message)] for message in messages])


def question_id(messages: Messages) -> str:
    """Identity of the question that a prompt asks: as `prompt_id`, whatever its case, white space and Unicode form."""
    return digest([[message["role"], plain_text(message["content"]), *_beyond(message)] for message in messages])


def _beyond(message: dict[str, Any]) -> list[list[str]]:
    """What a message has beyond role and content; nothing in most."""
    return [[key, message[key]] for key in BEYOND if message.get(key)]


def plain_text(text: str) -> str:
    """The text in small letters, with single spaces, and with one form for characters that Unicode writes in several.

    Superscripts, fractions and the like stay: 5² is not 52.
    """
    if not text.isascii():
        text = "".join(map(_plain_form, unicodedata.normalize("NFC", text)))
    folded = unicodedata.normalize("NFC", text.casefold())
    return " ".join(folded.split())


@lru_cache(maxsize=4096)
def _plain_form(char: str) -> str:
    if char in UNSEEN_INSIDE_WORDS:
        return ""
    form = unicodedata.decomposition(char).partition(" ")[0]
    return unicodedata.normalize("NFKC", char) if form in SAME_IN_MEANING else char


def split_name(name: str) -> str:
    """The name that a split has here, by one that it has elsewhere."""
    return SPLITS.get(name.strip().lower(), name)


def draw_seed(seed: int, row_id: str, role: str) -> int:
    """Seed of a row's own random draws for one role, below 2**31."""
    return int(digest(seed, row_id, role)[:8], 16) & 0x7FFFFFFF


def unit_draw(seed: int, row_id: str, role: str) -> float:
    """A uniform draw from [0, 1) that belongs to a row and a role."""
    # 52 bits, which a float between 0 and 1 holds exactly.
    return int(digest(seed, row_id, role)[:13], 16) / 16**13


def drop(row: Row, reason: str) -> Row:
    """The row with the reason why it cannot go on; the first reason stays."""
    return row if row.get("dropped") else {**row, "dropped": clean(reason) or "no reason given"}


def alive(row: Row) -> bool:
    """Whether the row has not been dropped."""
    return not row.get("dropped")


def clean(text: str) -> str:
    """The text without half characters, which no Arrow string takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def visible(text: str) -> str:
    """The text fit for a terminal or a page: characters that act on it, or cannot be seen, are written out."""
    return UNSEEN.sub(lambda found: _written_out(ord(found[0])), text)


def shown(text: str | None) -> str:
    """Model text fit for a page or a terminal: what acts on either is made visible, very long text is cut."""
    text = text or ""
    cut = visible(text[:SHOWN_CHARS])
    return cut if len(text) <= SHOWN_CHARS else f"{cut} … ({len(text)} characters)"


def _written_out(code: int) -> str:
    # As TOML and JSON write it too, so that a resolved job on the screen stays one.
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def text_of(messages: Messages) -> str:
    """The conversation as plain text for templates: the contents, or role by role if several."""
    if len(messages) == 1:
        return said(messages[0])
    return "\n\n".join(f"{message['role']}: {said(message)}" for message in messages)


def said(message: dict[str, Any]) -> str:
    """The content of a message, and the calls of tools behind it."""
    content, calls = message["content"], message.get("tool_calls")
    return f"{content}\n{calls}".strip() if calls else str(content)


def others_of(row: Row) -> list[Row]:
    """Of a group each answer between its chosen and its rejected one, with its value in every column of such a list."""
    columns = {name: values for name, values in row.items() if OTHERS in name.split("_") and values is not None}
    return [{name: values[place] for name, values in columns.items()} for place in range(len(columns.get(OTHERS, ())))]


def extra_of(row: Row) -> dict[str, Any]:
    """The source's other columns, kept as JSON text so that any source fits one schema."""
    extra: dict[str, Any] = json.loads(row.get("extra") or "{}")
    return extra


def annotator_of(extra: Mapping[str, Any], column: str) -> str:
    """Whose preference a row is, by the source's other columns; empty where nobody is named."""
    value = extra.get(column)
    # A number that is none stands for what is missing in some files.
    named = isinstance(value, str | int | float) and not isinstance(value, bool) and value == value
    return str(value).strip() if named else ""


def table_of(rows: list[Row]) -> pa.Table:
    """Rows as a table with every column that any row has, and always `dropped`.

    (`pa.Table.from_pylist` alone would take the first row's columns for all of them.)
    """
    import pyarrow as pa

    columns: dict[str, list[object]] = {}
    for name in [*dict.fromkeys(chain.from_iterable(rows)), "dropped"]:
        columns[name] = [row.get(name) for row in rows]
    return pa.table(columns)


def rows_of(parts: Iterable[pa.Table]) -> Iterator[Row]:
    """The rows of several tables, one after the other; of one table at a time they are held as Python's objects."""
    for part in parts:
        yield from part.to_pylist()


def by_id(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows by their ids."""
    return {row[ID_COLUMN]: row for row in rows}
