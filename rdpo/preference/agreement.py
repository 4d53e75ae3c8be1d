"""How far rewards and teacher agree, over all pairs: shares, means, whose answers they are, and the defects of the
conversations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc

from rdpo.config import Pairs
from rdpo.records import OTHERS, SIDES, VOICE

COLUMNS = ["chosen_from", "rejected_from", "chosen_scores", "rejected_scores"]
VOICES = [f"{side}{VOICE}" for side in SIDES]
SWAPPED = "swapped"
"""The column of pairs whose sides stand the other way round than the settings name them."""


@dataclass
class Agreement:
    """What one reward says of the teacher's direction, over all rows: ties count half in `preferred`."""

    preferred: float
    chosen_mean: float
    rejected_mean: float
    constant: bool


def agreement(parts: Iterable[pa.Table], settings: Pairs) -> dict[str, Agreement]:
    """Each reward's scores of the teacher's chosen answers against those of its rejected ones."""
    named = [(settings.chosen, settings.rejected), *((sides.chosen, sides.rejected) for sides in settings.also)]
    sums: dict[str, Tally] = {}
    for part in parts:
        for pair in part.select([*COLUMNS, *({SWAPPED} & {*part.column_names})]).to_pylist():
            against = pair.get(SWAPPED)
            if against is None:
                # Pairs of earlier versions do not say it; of theirs only the names tell.
                against = (pair["rejected_from"], pair["chosen_from"]) in named

            sides = ("rejected_scores", "chosen_scores") if against else ("chosen_scores", "rejected_scores")
            first, second = (pair[side] or {} for side in sides)
            for name, score in first.items():
                # Not every row has the data set's own scores; a table writes null where there is none.
                if score is not None and second.get(name) is not None:
                    sums.setdefault(name, Tally()).add(score, second[name])
    return {name: tally.agreement() for name, tally in sums.items()}


@dataclass
class Tally:
    """Sums over the pairs of one reward."""

    rows: int = 0
    preferred: float = 0.0
    chosen: float = 0.0
    rejected: float = 0.0
    lowest: float = math.inf
    highest: float = -math.inf

    def add(self, chosen: float, rejected: float) -> None:
        """Count one pair."""
        self.rows += 1
        self.preferred += 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0
        self.chosen += chosen
        self.rejected += rejected
        self.lowest = min(self.lowest, chosen, rejected)
        self.highest = max(self.highest, chosen, rejected)

    def agreement(self) -> Agreement:
        """The means."""
        share, chosen, rejected = (total / self.rows for total in (self.preferred, self.chosen, self.rejected))
        return Agreement(share, chosen, rejected, self.lowest == self.highest)


def count_defects(parts: Iterable[pa.Table]) -> dict[str, int]:
    """How many rows have each defect."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(chain.from_iterable(part["defects"].to_pylist()))
    return dict(counts)


def count_voices(parts: Iterable[pa.Table]) -> dict[str, dict[str, int]]:
    """How often the answer of each drawn voice is chosen, and how often rejected; nothing where none was drawn."""
    counts: dict[str, dict[str, int]] = {}
    for part in parts:
        for side, column in zip(SIDES, VOICES, strict=True):
            for voice in part[column].to_pylist() if column in part.column_names else ():
                if voice is not None:
                    counts.setdefault(voice, dict.fromkeys(SIDES, 0))[side] += 1
    return dict(sorted(counts.items()))


def count_answers(parts: Iterable[pa.Table]) -> dict[str, int]:
    """How many groups have so many answers, by their number; `parts` have the column `others`."""
    counts: Counter[int] = Counter()
    for part in parts:
        if OTHERS in part.column_names:
            counts.update(len(SIDES) + (size or 0) for size in pc.list_value_length(part[OTHERS]).to_pylist())
    return {str(size): counts[size] for size in sorted(counts)}
