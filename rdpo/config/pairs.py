"""Preference pairs: how they are made, mixed with ready ones, and given the reference's log-probs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rdpo.config.models import Readers
from rdpo.config.section import MEMORY, PLACEMENT, UNSAID, Section, Source

BEST, WORST, REST = "best", "worst", "rest"

Defect = Literal["refusal", "empty_critique", "no_change_asked", "repeats_response", "quotes_critique", "preamble"]
"""What can be wrong with the teacher's turns."""


class Sides(Section):
    """Two answers that make a pair."""

    chosen: str
    """The turn whose answer is preferred."""
    rejected: str
    """The turn whose answer is not."""


class Pairs(Section):
    """How scored answers become preference pairs."""

    chosen: str = "revision"
    """The turn whose answer is preferred (`chosen` in a ready preference data set), or `best`: the answer with the
    highest score among the samples of `among`."""
    rejected: str = "response"
    """The turn whose answer is not (`rejected` in a ready preference data set), or `worst`."""
    among: str = "response"
    """The turn with several `samples` from which `best` and `worst` are taken."""
    min_samples: int = Field(default=2, ge=2)
    """Drop rows with fewer usable samples: those that `min_answer_chars` and `drop_truncated` would not drop."""
    length_coef: float | Literal["auto"] = 0.0
    """What a character costs a sample in the choice of `best` and `worst`; `auto`: so much that chosen answers are
    on average as long as rejected ones (DICE, arXiv 2406.09760)."""
    also: list[Sides] = Field(default_factory=list)
    """Further pairs from each row, as `[{ chosen = "control", rejected = "negative" }]`."""
    others: Annotated[Literal["rest"] | list[str] | None, UNSAID] = None
    """Make groups: further answers between the chosen and the rejected one. `rest`: all other usable samples of
    `among`, in the order of their scores; or turns in the order of preference. With `direction = "reward"` all answers
    of a group stand in the order of their scores. What would drop a pair is left out of a group. Which loss goes
    over them, `training.loss` says."""
    condition: str | None = None
    """The turn whose question becomes the pair's prompt; by default the prompt itself, whatever was asked to get the
    answers."""
    direction: Literal["teacher", "reward"] = "teacher"
    """`teacher`: chosen is as named above; `reward`: the answer with the higher score is chosen."""
    min_gap: float | None = None
    """Drop pairs with `score_chosen - score_rejected` (weighted sums of the rewards) below this; by default none."""
    max_gap: Annotated[float | None, UNSAID] = None
    """Drop pairs whose gap is this or more; by default none. With `min_gap` in one round and `max_gap` in the next,
    those that the rewards tell apart well are trained on first (MPO, arXiv 2403.19443)."""
    min_score: Annotated[float | None, UNSAID] = None
    """Drop pairs whose chosen answer scores below this; by default none. With `training.loss = "sft"` that is filtered
    alignment (arXiv 2308.12050)."""
    min_answer_chars: int = Field(default=1, ge=1)
    """Drop pairs with an answer of fewer characters."""
    drop_defects: list[Defect] = Field(default_factory=list)
    """Drop rows with these defects of the teacher's turns, see `rdpo.synthesis.defects`; all are counted anyway."""
    heldout_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompts whose pairs are not trained on, and not flipped: after training it is measured how often
    the model prefers their chosen side."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Share of the pairs whose sides change places, scores and all: noise in the teacher's direction, to see what a
    method makes of it. Which answers are cut off or too short is looked at before, `min_gap` after."""
    random_sides: Annotated[bool, UNSAID] = False
    """Draw the sides of all pairs that are left, behind `min_gap` and the like, at random by the seed: a control, which
    has the same pairs and no preference."""
    drop_truncated: Literal["never", "chosen", "any"] = "never"
    """Drop pairs whose chosen answer (or either) was cut off at the token limit."""

    @model_validator(mode="after")
    def _check_random(self) -> Pairs:
        if self.random_sides and self.flip:
            raise ValueError("random_sides leaves nothing that flip could turn round; remove one of the two")
        return self

    @model_validator(mode="after")
    def _check_gaps(self) -> Pairs:
        if self.max_gap is not None and self.min_gap is not None and self.max_gap <= self.min_gap:
            raise ValueError(
                f"max_gap = {self.max_gap:g}: no gap is below that and at least min_gap = {self.min_gap:g}"
            )
        return self

    @model_validator(mode="after")
    def _check_others(self) -> Pairs:
        if self.others and self.also:
            raise ValueError("others makes one group of each row, also further pairs; remove one of the two")
        if self.others == []:
            raise ValueError("others names no answer; remove it, or give `rest` or names of turns")
        named = [self.chosen, self.rejected, *(self.others if isinstance(self.others, list) else ())]
        if self.others and len(set(named)) < len(named):
            raise ValueError(f"others: {', '.join(named)}: each answer of a group is named once")
        return self


class Replay(Section):
    """Ready preference pairs that are trained on beside the generated ones (DICE, arXiv 2406.09760)."""

    source: Source
    """A preference data set, read as `prompts.source` is, with `chosen` and `rejected`; the `pairs` folder of
    another run is one. Scores of their own count in the loss as they are; a pair without scores is dropped where the
    loss goes by them."""
    share: float = Field(default=0.5, ge=0, le=1)
    """Gamma: their share of the pairs that are trained on."""
    column: str = "prompt"
    """Their column with the prompt."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many of them."""


class Reference(Readers):
    """The cached log-probs of the reference, computed by the forward that training uses."""

    cpus: Annotated[int | None, PLACEMENT] = Field(default=None, ge=1)
    """CPU cores of one process; by default all cores of the machine without GPUs, or its shard's part of them; one
    with GPUs."""
    train_on: Annotated[Literal["last", "all"], UNSAID] = "last"
    """Which messages of the assistant count in the loss, in ready pairs whose sides have several behind what they have
    in common, results of tools between them. `last`: such pairs are dropped, for only a last answer is trained on.
    `all`: all of the assistant's; what tools return is read and not counted."""
    max_length: int = Field(default=1024, ge=16)
    """Pairs whose prompt and longer completion together have more tokens are dropped, never cut."""
    tokens_per_batch: Annotated[int, MEMORY] = Field(default=4096, ge=32)
    """Token budget of one forward, padding included."""
