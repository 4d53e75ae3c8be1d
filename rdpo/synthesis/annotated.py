"""Rows of annotators: two of one prompt, or of one pair, are two rows, and a row that is trained on names one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rdpo.config import Annotators
from rdpo.records import annotator_of, digest

NO_ANNOTATOR = "no annotator in the column that annotators.column names"


def named_by(settings: Annotators, row_id: str, extra: Mapping[str, Any], needed: bool) -> tuple[str, str | None]:
    """The id of a row by its prompt or pair and by its annotator, and why it cannot be used, if it cannot.

    `extra` are the source's other columns. Where it is not `needed`, a row may do without an annotator.
    """
    annotator = annotator_of(extra, settings.column)
    if annotator:
        return digest(row_id, annotator), None
    return row_id, NO_ANNOTATOR if needed else None
