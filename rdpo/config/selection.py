"""Which rows are worth the price of a reward."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from rdpo.config.models import Readers
from rdpo.config.section import MEMORY, Address


class Selection(Readers):
    """The rows that the rewards score, chosen by what the student says of its own answers (APL, arXiv 2402.08114)."""

    prompts: int | None = Field(default=None, ge=1)
    """Keep so many rows, those whose answers the student is least sure of: with the highest predictive entropy."""
    pairs: int | None = Field(default=None, ge=1)
    """Of these keep so many, those where the student prefers one of the answers most: with the largest difference of
    its implicit rewards."""
    turn: str | None = None
    """The turn whose answers the entropy is estimated from, `samples` of the bare prompt by the student at temperature
    1; by default `pairs.among`."""
    reference: Address | None = None
    """The model against which the student has implicit rewards, named as in `student.model`. By default, in rounds, the
    model that the round before began with; in the first one there is none, and `pairs` goes by the entropy too."""
    tokens_per_batch: Annotated[int, MEMORY] = Field(default=4096, ge=32)
    """Token budget of one forward, padding included."""

    @model_validator(mode="after")
    def _check_some(self) -> Selection:
        if self.prompts is None and self.pairs is None:
            raise ValueError("give prompts, pairs or both; without them all rows are scored")
        if self.prompts is not None and self.pairs is not None and self.pairs >= self.prompts:
            raise ValueError("pairs are chosen among prompts; give fewer of them")
        return self
