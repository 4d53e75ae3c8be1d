"""Rows that come from annotators who disagree, and the types of preference that they are told apart by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from rdpo.config.pairs import BEST, WORST
from rdpo.config.section import Section

if TYPE_CHECKING:
    from rdpo.config.job import Job

LIKELIHOODS = ("dpo", "plackett_luce")
"""Losses that are the negative log-likelihood of a row's order."""
AT_REST = {"label_smoothing": 0.0, "margin": 0.0, "sft_coef": 0.0, "policy_weight": "none"}
"""Options with which the loss of a row is no log-likelihood any more, as they are without effect."""


class Annotators(Section):
    """A mixture of types of preference, fitted to rows of annotators who disagree (EM-DPO, arXiv 2405.15065).

    `rdpo run` trains a policy for each type, finds out which type each annotator is of, and repeats both.
    """

    column: str = "annotator"
    """Column of the prompts' source that names whose preference the row is. Rows that are trained on and name nobody
    are dropped. With ready pairs it is who chose; with a task the rewards score by it."""
    types: int = Field(default=2, ge=2, le=8)
    """How many types of preference there are."""
    steps: int = Field(default=5, ge=1)
    """How many times at most the policies of all types are trained, each time from the start model."""
    tolerance: float = Field(default=0.01, ge=0, lt=1)
    """The last step is the one in which no annotator's share in a type moves by more than this."""

    @property
    def trainings(self) -> int:
        """How many trainings there are at most: one for all annotators together, and those of all types and steps."""
        return 1 + self.types * self.steps

    @property
    def work(self) -> str:
        """What a run with these types does once the reference is there, in words."""
        each = f"1 for all annotators, then {self.types} types in each of at most {self.steps} steps"
        return f"{self.trainings} trainings at most ({each}); {self.types} policies are evaluated and published"


def check_annotators(job: Job) -> None:
    """Look whether the types of a job's annotators can be told apart as the method does it.

    Raises:
        ValueError: a row's loss is no likelihood of its order, or the rows are no independent ones of annotators.
    """
    if job.annotators is None:
        return
    _check_loss(job)
    _check_rows(job, job.annotators.column)


def _check_loss(job: Job) -> None:
    training = job.training
    if training.loss not in LIKELIHOODS or (training.loss == "dpo" and job.pairs.others):
        found = f"{training.loss} over a group" if training.loss == "dpo" else training.loss
        raise ValueError(
            f"annotators: types are told apart by how likely a row's order is, and the loss {found} is no such "
            'likelihood; set training.loss = "plackett_luce", or "dpo" without pairs.others'
        )
    if training.reward_use not in ("none", "offset"):
        raise ValueError(
            f'annotators: with training.reward_as = "{training.reward_as}" the loss of a row is no likelihood of its '
            'order; set it to "none" or "offset"'
        )
    if training.reward_use == "offset" and training.offset_transform != "identity":
        raise ValueError(
            "annotators: with offset_transform the two orders of a pair have no probabilities that add up to 1; remove "
            "training.offset_transform"
        )
    for name, at_rest in AT_REST.items():
        if getattr(training, name) != at_rest:
            raise ValueError(
                f"annotators: with {name} the loss of a row is no likelihood of its order; remove training.{name}"
            )
    if training.max_steps == 0:
        raise ValueError("annotators: training.max_steps = 0 trains no types; remove it")
    if training.select == "best":
        raise ValueError(
            "annotators: held-out pairs are of all annotators, and the best weights for them are no type's; set "
            'training.select = "last"'
        )
    if training.extrapolation:
        raise ValueError(
            "annotators: the types are told apart by the weights that training leaves, not by those that extrapolation "
            "makes of them; set training.extrapolation = 0"
        )


def _check_rows(job: Job, column: str) -> None:
    if column in (job.prompts.column, "split"):
        raise ValueError(
            f"annotators: column {column!r} holds something else already; name the one with the annotators"
        )
    if job.prompts.made:
        raise ValueError("annotators: prompts that a model makes are no annotator's; give prompts.source")
    if job.replay:
        raise ValueError("annotators: ready pairs of replay name no annotator; remove [replay]")
    if job.rounds.count > 1:
        raise ValueError(
            "annotators: rounds go on from one model, and there is one for each type; set rounds.count = 1"
        )
    if job.pairs.also:
        raise ValueError(
            "annotators: several pairs of the same answers are no independent rows; remove pairs.also, or give "
            'pairs.others with training.loss = "plackett_luce"'
        )
    named = {job.pairs.chosen, job.pairs.rejected}
    if job.synthesis.task and job.pairs.direction == "teacher" and not named & {BEST, WORST}:
        raise ValueError(
            "annotators: the teacher's direction is the same for all annotators; order the answers by scores of a "
            'reward that goes by the annotator: pairs.direction = "reward", or pairs.chosen = "best"'
        )
