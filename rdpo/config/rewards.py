"""The external rewards, and the known pairs on which they are tried."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from rdpo.config.models import Engine, Readers, Sampling
from rdpo.config.section import MEMORY, PLACEMENT, UNSAID, Address, Concurrency, Dtype, Section, Source


def _module_and_name(function: str) -> str:
    if re.fullmatch(r"[\w.]+:\w+", function):
        return function
    module, _, name = function.rpartition(".")
    meant = f"; did you mean `{module}:{name}`?" if re.fullmatch(r"[\w.]+", module) and name.isidentifier() else ""
    raise ValueError(f"write MODULE:NAME with one colon, as my_rewards:brevity{meant}")


class RewardSection(Section):
    """What every reward has in common."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name of its score in tables, metrics and the report."""
    weight: float = 1.0
    """Its weight in the score that is optimised; 0 measures without optimising."""

    @property
    def engines(self) -> dict[str, Engine]:
        """Its sections of vLLM engines, by their fields."""
        return {name: value for name, value in self if isinstance(value, Engine)}


class ClassifierReward(RewardSection):
    """A reward model with a classification head, run through transformers."""

    kind: Literal["classifier"]
    model: Address
    """A sequence-classification model with one output, named as in `student.model`."""
    dtype: Dtype = "auto"
    """Precision of its forward; `auto` as in `student.dtype`."""
    max_length: int = Field(default=1024, ge=8)
    """Most tokens that it reads, never more than it has positions for; a longer conversation keeps its last ones."""
    answer_only: bool = False
    """Score the answer by itself, without the prompt (for style and sentiment models)."""
    batch_size: Annotated[int, MEMORY] = Field(default=16, ge=1)
    """Conversations in one forward."""
    concurrency: Annotated[Concurrency, PLACEMENT] = 1
    """Number of reward actors, or `[smallest, largest]`."""
    gpus: Annotated[float, PLACEMENT] = Field(default=0, ge=0)
    """GPUs of one actor, 1 at most; a fraction shares a GPU."""
    engine: Engine | None = None
    """Engines (a `[rewards.engine]` table) in place of transformers: for a model that no GPU holds, whose layers are
    split over `engine.gpus`, and for many answers to a prompt, which is read once. The model is a decoder."""

    @model_validator(mode="after")
    def _check_engine(self) -> ClassifierReward:
        if self.gpus > 1:
            raise ValueError(
                f"gpus = {self.gpus:g}: one actor uses one GPU; for a larger model give engine = {{ gpus = "
                f"{math.ceil(self.gpus)} }}, which splits every layer"
            )
        if self.engine is None:
            return self
        if own := {"gpus", "concurrency", "batch_size", "dtype"} & self.model_fields_set:
            raise ValueError(f"{min(own)}: with an engine its own table says that; move it to engine, or remove it")
        if self.max_length > self.engine.max_model_len:
            raise ValueError(
                f"max_length = {self.max_length}: engine.max_model_len = {self.engine.max_model_len} is less; "
                "raise it to that or more"
            )
        return self


class JudgeReward(RewardSection):
    """A language model that rates an answer by a rubric, or compares two answers."""

    kind: Literal["judge"]
    model: Address | None = None
    """The judge's model, named as in `student.model`; by default the student."""
    rubric: str
    """Template of the question put to the judge; it may use `prompt` and `answer`, or with `pairwise` `prompt`,
    `first` and `second`."""
    score: Literal["expected", "written"] = "expected"
    """`expected`: the mean of the ratings under the probabilities of their tokens, from one token; a judge that gives
    them hardly any probability drops the row. `written`: the rating in a reply that may reason first, with its sign and
    decimals: `[[4]]`, `Overall: 4`, `Rating: 4`, `4/5`, or the only number; ratings that differ are none."""
    ratings: list[str] = Field(default=["1", "2", "3", "4", "5"], min_length=2)
    """The words the judge chooses from, numbers counting as their value; each one token where the score is
    `expected`, the ends of the scale where it is `written`."""
    pairwise: bool = False
    """Show two answers at a time, in both orders; the score is the mean probability of the first of two `ratings`
    for the answer that stands first, of the second for the one that stands second."""
    votes: int = Field(default=1, ge=1)
    """Replies drawn for each answer where the score is `written`; their mean counts."""
    sampling: Sampling = Sampling()
    """How `written` replies are drawn."""
    prefill: str = ""
    """Text put into the judge's mouth before the rating, for example `Rating: `."""
    engine: Engine = Engine()
    """The judge's engines."""

    @model_validator(mode="after")
    def _check_score(self) -> JudgeReward:
        if self.pairwise and (self.score == "written" or len(self.ratings) != 2):
            raise ValueError('pairwise takes two `ratings`, as in ["A", "B"], and the `expected` score')
        if self.votes > 1 and (self.score == "expected" or self.sampling.temperature == 0):
            raise ValueError('votes are drawn: give score = "written" and sampling.temperature above 0')
        return self


class ImplicitReward(RewardSection, Readers):
    """DPO's implicit reward of a trained model against the model it was trained from (arXiv 2406.09760)."""

    kind: Literal["implicit"]
    model: Address | None = None
    """The trained model, named as in `student.model`, with its adapter merged; by default the student."""
    reference: Address | None = None
    """The model it was trained from; by default the student. Both have the same tokenizer."""
    reference_adapter: Annotated[Address | None, UNSAID] = None
    """A LoRA adapter on `reference`, merged into it."""
    beta: float = Field(default=0.1, gt=0)
    """The beta it was trained with."""
    normalization: Literal["sum", "token_mean"] = "sum"
    """Log-ratio of the whole answer, or its mean per token."""
    dtype: Dtype = "auto"
    """Precision of both forwards; `auto` as in `student.dtype`."""
    tokens_per_batch: Annotated[int, MEMORY] = Field(default=4096, ge=32)
    """Token budget of one forward, padding included."""

    @model_validator(mode="after")
    def _check_models(self) -> ImplicitReward:
        if self.model is None and self.reference is None:
            raise ValueError("the student against itself is 0 everywhere; give model, or the reference it came from")
        if self.reference_adapter and self.reference is None:
            raise ValueError("reference_adapter: give the model that it is on as reference")
        return self


class FunctionReward(RewardSection):
    """A Python function `f(prompt: list[dict], answer: str, row: dict) -> float`."""

    kind: Literal["function"]
    function: Annotated[str, AfterValidator(_module_and_name)]
    """Where it is: `package.module:name`, importable from the working directory."""


Reward = Annotated[ClassifierReward | JudgeReward | ImplicitReward | FunctionReward, Field(discriminator="kind")]


class Calibration(Section):
    """Known pairs on which the rewards are tried before the long work."""

    source: Source | None = None
    """A preference data set, read as `prompts.source` is, with `chosen` and `rejected`; printed is how often each
    reward prefers the chosen side. By default two plain pairs, to see that every model loads and gives numbers."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many of them."""
