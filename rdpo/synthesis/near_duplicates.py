"""Prompts that nearly repeat a held-out one: MinHash finds the candidates, the true similarity decides.

Two texts are nearly the same if of all runs of five characters that either has, at least 80% are in both (Jaccard
similarity of sets of 5-grams, as in arXiv 2107.06499 with words). Case, white space and Unicode form do not count.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from datasketch import MinHash, MinHashLSH

from rdpo.messages import TOOLS
from rdpo.records import HELDOUT, ID_COLUMN, Row, extra_of, plain_text, rows_of
from rdpo.synthesis.prompts import BARE

if TYPE_CHECKING:
    from rdpo.files.stage_folder import StageFolder

THRESHOLD = 0.8
RUN_CHARS = 5
PERMUTATIONS = 128
# A candidate too many costs a comparison, one too few is missed.
FALSE_POSITIVE, FALSE_NEGATIVE = 0.1, 0.9
COLUMNS = [ID_COLUMN, "split", "prompt", "extra"]


def near_duplicates(heldout: Iterable[str], others: Iterable[tuple[str, str]]) -> set[str]:
    """Names of the `others` (name and text) that are nearly the same as a held-out text."""
    index = MinHashLSH(THRESHOLD, PERMUTATIONS, weights=(FALSE_POSITIVE, FALSE_NEGATIVE))
    known: list[frozenset[bytes]] = []
    for text in heldout:
        known.append(_runs(text))
        index.insert(len(known) - 1, _signature(known[-1]))

    found: set[str] = set()
    for name, text in others:
        runs = _runs(text)
        if any(similarity(runs, known[place]) >= THRESHOLD for place in index.query(_signature(runs))):
            found.add(name)
    return found


def similarity(one: frozenset[bytes], other: frozenset[bytes]) -> float:
    """Jaccard similarity of two sets that are not both empty."""
    return len(one & other) / len(one | other)


def _runs(text: str) -> frozenset[bytes]:
    """All runs of five characters of a text; a shorter text is one run."""
    text = plain_text(text)
    starts = range(max(1, len(text) - RUN_CHARS + 1))
    return frozenset(text[start : start + RUN_CHARS].encode("utf-8", "surrogatepass") for start in starts)


@lru_cache(maxsize=1)
def _empty() -> MinHash:
    """The signature of no text."""
    return MinHash(PERMUTATIONS, hashfunc=zlib.crc32)


def _signature(runs: frozenset[bytes]) -> MinHash:
    # Drawing its permutations anew takes longer than all else.
    signature = _empty().copy()
    signature.update_batch(list(runs))
    return signature


def near_heldout(folder: StageFolder, templates: bool) -> set[str]:
    """Ids of the kept prompts of a folder that are not held out, and nearly repeat one that is.

    With `templates` the bare prompts are compared, without what was put around them.
    """
    heldout, others = [], []
    for row in rows_of(folder.tables(columns=COLUMNS)):
        if row["split"] == HELDOUT:
            heldout.append(_asked(row, templates))
        else:
            others.append((row[ID_COLUMN], _asked(row, templates)))
    return near_duplicates(heldout, others)


def _asked(row: Row, templates: bool) -> str:
    """The words of a prompt but for its system message and the tools, which many prompts share."""
    words = [message["content"] for message in row["prompt"] if message["role"] not in ("system", TOOLS)]
    if templates:
        words[-1] = extra_of(row).get(BARE, words[-1])
    return "\n".join(words)
