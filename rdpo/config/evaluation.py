"""What is done with the trained model: evaluation, further rounds, publishing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rdpo.config.models import Engine, Sampling
from rdpo.config.section import Section, Source

KL_ANSWERS = 100


class Evaluation(Section):
    """Held-out prompts answered by the start model and the trained one, and compared."""

    limit: int | None = Field(default=None, ge=1)
    """At most so many held-out prompts, the first by id; by default all."""
    condition: str | None = None
    """The turn of the task whose question is asked; by default the prompt itself."""
    refine: bool = False
    """The trained model's answer goes through the turns of the task, and the one that `pairs.chosen` names counts:
    self-refinement at inference. With `training.max_steps = 0` that is the baseline that trains nothing."""
    sampling: Sampling = Sampling()
    """How both models answer."""
    engine: Engine = Engine()
    """The engines of both models."""
    kl_answers: int = Field(default=KL_ANSWERS, ge=0)
    """For KL the trained model answers so many held-out prompts, the first by id, once more: at temperature 1 and
    top_p 1, whatever `sampling` says, because only such answers estimate KL(policy || reference) without bias. 0
    measures none; nor does `refine`, whose answers have no log-probs."""
    samples: int = Field(default=1000, ge=0)
    """At most so many prompts stand in the report with both answers: of more, those that gained and lost most, and
    others."""


class Retention(Section):
    """Conversations that the training is not about; measured is how much likelihood they lose by it."""

    source: Source
    """Where they are, read as `prompts.source` is."""
    column: str = "prompt"
    """Their column with the prompt."""
    answer: str = "answer"
    """Their column with the answer, a text."""
    limit: int = Field(default=200, ge=1)
    """Use only the first so many of them."""


class Rounds(Section):
    """The whole run several times, each time from the model that the last one made. In a comparison (`rdpo compare`)
    every round is made, whatever it gains, and each is held against the baseline after as many rounds."""

    count: int = Field(default=1, ge=1)
    """How many rounds at most."""
    watch: str = "optimised"
    """The reward that must rise on the held-out prompts, by its name; `optimised` is the weighted sum."""
    min_gain: float = 0.0
    """A round that does not raise its mean by more is the last, and its model is not taken."""
    reward_reference: Literal["previous", "fixed"] = "previous"
    """What an implicit reward is measured against from round 2 on: the start model of the round before, as in DICE, or
    the `reference` of the job in all rounds."""


class Publish(Section):
    """The Hugging Face folder that leaves the run."""

    merge: bool = True
    """Merge a LoRA adapter into the weights; the adapter is kept in `model/adapter` in any case, but for a new one on a
    student that `student.adapter` was merged into: others do not have that model."""
    max_shard_gb: float = Field(default=4.0, gt=0)
    """Largest size of one safetensors file, in GB."""
    license: str | None = None
    """Licence named on the model card, by its id on the hub (`apache-2.0`)."""
