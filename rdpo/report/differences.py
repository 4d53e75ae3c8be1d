"""What changed from one text to another, word by word, marked in both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from markupsafe import Markup, escape

from rdpo.records import shown

# Words with the space after them; scripts that put no space between words are compared character by character.
UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"
WORDS = re.compile(rf"[{UNSPACED}]\s*|[^\W{UNSPACED}]+\s*|\W\s*")
FEW = 0.2


@dataclass(frozen=True)
class Difference:
    """Two texts as they stand in a page, what is in one alone marked; and the share of words they have in common."""

    before: Markup
    after: Markup
    kept: float


def difference(before: str, after: str) -> Difference:
    """The difference of two model texts; where they have hardly a word in common, nothing is marked."""
    left, right = (WORDS.findall(shown(text)) for text in (before, after))
    matcher = SequenceMatcher(None, [word.strip() for word in left], [word.strip() for word in right])

    kept = matcher.ratio()
    if kept < FEW:
        return Difference(escape("".join(left)), escape("".join(right)), kept)

    changes = matcher.get_opcodes()
    return Difference(
        Markup("").join(_marked("del", left[start:end], kind) for kind, start, end, _, _ in changes),
        Markup("").join(_marked("ins", right[start:end], kind) for kind, _, _, start, end in changes),
        kept,
    )


def _marked(tag: str, words: Sequence[str], kind: str) -> Markup:
    text = "".join(words)
    words_end = len(text.rstrip())
    if kind == "equal" or not words_end:
        return escape(text)
    return Markup(f"<{tag}>{{}}</{tag}>{{}}").format(text[:words_end], text[words_end:])
