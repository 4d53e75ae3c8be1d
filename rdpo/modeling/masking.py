"""Tokens of a completion that a model reads and that do not count in its log-prob, such as reasoning that is masked.

Among a completion's ids such a token stands as its complement `~id`, a negative number. So it keeps its place in every
list and table, and code that takes it for a token fails at once, where a mask beside the ids could be forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence


def masked(ids: Sequence[int]) -> list[int]:
    """The ids as tokens that are read and not counted."""
    return [~token if token >= 0 else token for token in ids]


def read_ids(ids: Sequence[int]) -> list[int]:
    """The ids as a model reads them, counted or not."""
    return [token if token >= 0 else ~token for token in ids]


def counted_ids(ids: Sequence[int]) -> list[int]:
    """The ids that count."""
    return [token for token in ids if token >= 0]
