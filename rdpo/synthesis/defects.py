"""What can be wrong with a conversation of teacher and self: found by plain rules on the text, counted, never cut.

The rules are for English; they say how often, not for certain. Peers train on such rows without a word.
"""

from __future__ import annotations

import re

from rdpo.config import Defect
from rdpo.records import Row

REFUSAL = re.compile(
    # Possessive: a long run of blanks would else be divided in every way between these and the blanks below.
    r"^\W*+(i'?m sorry|i am sorry|sorry|i apologi[sz]e|unfortunately)?[,.]?\s*(but\s+)?"
    r"((i\s+(can'?t|cannot|can not|won'?t|will not|am not able to|am unable to)|i'?m (unable|not able) to)\s+"
    r"(\w+ly\s+)?(help|assist|provide|answer|comply|fulfil|create|write|discuss|engage|support|continue|share|give|offer|do)"
    r"|as an ai\b)",
    re.IGNORECASE,
)
NO_CHANGE = re.compile(
    r"\b(no (changes?|revisions?|improvements?|corrections?) (is|are|were)?\s*(needed|necessary|required)"
    r"|nothing (needs to|to) (be )?(change|improve|correct)|(looks?|is) (already )?(good|fine|perfect) as it is)",
    re.IGNORECASE,
)
PREAMBLE = re.compile(
    r"^\W*(sure|certainly|of course|here('?s| is| are)|below is)\b[^\n]{0,80}"
    r"\b(revised|revision|rewritten|rewrite|improved|new) (answer|response|version)\b[^\n]{0,40}:",
    re.IGNORECASE,
)
EMPTY_WORDS = 3
QUOTED_WORDS = 12


def defects(row: Row, response: str, revision: str) -> list[Defect]:
    """The defects of one row of the synthesis stage; all turns but `response` and `revision` count as critiques."""
    texts = {name.removesuffix("_finish_reason") for name in row if name.endswith("_finish_reason")}
    critiques = [_straight(row[name]) for name in texts - {response, revision}]
    first, last = _straight(row[response]), _straight(row[revision])

    found: dict[Defect, bool] = {
        "refusal": bool(REFUSAL.match(last)),
        "empty_critique": any(len(text.split()) < EMPTY_WORDS for text in critiques),
        "no_change_asked": any(bool(NO_CHANGE.search(text)) for text in critiques),
        "repeats_response": first == last or _words(first) == _words(last) != [],
        "quotes_critique": any(_share_words(text, last) for text in critiques),
        "preamble": bool(PREAMBLE.match(last)),
    }

    return [name for name, present in found.items() if present]


def _straight(text: str | None) -> str:
    return (text or "").replace("\u2019", "'")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _share_words(critique: str, answer: str) -> bool:
    """Whether the answer has a dozen words of the critique in a row."""
    return not _runs(_words(critique)).isdisjoint(_runs(_words(answer)))


def _runs(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + QUOTED_WORDS]) for start in range(len(words) - QUOTED_WORDS + 1)}
