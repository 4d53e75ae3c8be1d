"""Reference log-probs that another run has made of the same answers with the same weights, by the answers' tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa

from rdpo.records import SIDES, Row, rows_of

OPTIONAL = ["others_ids", "reference_others_logps"]
COLUMNS = ["prompt_ids", *(f"{side}_ids" for side in SIDES), *(f"reference_{side}_logps" for side in SIDES)]

KnownLogps = dict[bytes, float]
"""Summed log-probs of answers in nats, by `answer_key`."""


def answer_key(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> bytes:
    """16 bytes that stand for an answer behind its prompt."""
    # With the prompt's length, else the same tokens divided elsewhere would be the same answer.
    tokens = np.array([len(prompt_ids), *prompt_ids, *answer_ids], dtype=np.int64)
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def known_logps(tables: Iterable[pa.Table]) -> KnownLogps:
    """The log-probs of all answers in rows of reference stages (with `COLUMNS`, and of groups `OPTIONAL`)."""
    return dict(chain.from_iterable(map(_entries, rows_of(tables))))


def _entries(row: Row) -> Iterator[tuple[bytes, float]]:
    for side in SIDES:
        yield answer_key(row["prompt_ids"], row[f"{side}_ids"]), row[f"reference_{side}_logps"]
    for ids, logp in zip(row.get("others_ids") or (), row.get("reference_others_logps") or (), strict=True):
        yield answer_key(row["prompt_ids"], ids), logp


def recalled(row: Row, known: KnownLogps) -> Row:
    """The tokenized pair or group with all its log-probs if all are known, else without any."""
    answers = [*(row[f"{side}_ids"] for side in SIDES), *(row.get("others_ids") or ())]
    # Nothing is hashed where nothing is known: most runs have no siblings.
    found = [known.get(answer_key(row["prompt_ids"], ids)) for ids in answers] if known else [None]
    chosen, rejected, *others = [None] * len(answers) if None in found else found
    row = {**row, "reference_chosen_logps": chosen, "reference_rejected_logps": rejected}
    return {**row, "reference_others_logps": others} if others else row
