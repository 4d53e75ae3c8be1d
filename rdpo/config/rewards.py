"""The external rewards, and the known pairs on which they are tried."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from rdpo.config.models import Endpoint, Engine, Readers, Sampling, Server
from rdpo.config.section import (
    MEMORY,
    PLACEMENT,
    UNSAID,
    Address,
    Concurrency,
    Dtype,
    Section,
    Source,
    TemplateArguments,
)


def _module_and_name(function: str) -> str:
    if re.fullmatch(r"[\w.]+:\w+", function):
        return function
    module, _, name = function.rpartition(".")
    meant = f"; did you mean `{module}:{name}`?" if re.fullmatch(r"[\w.]+", module) and name.isidentifier() else ""
    raise ValueError(f"write MODULE:NAME with one colon, as my_rewards:brevity{meant}")


RATING = "rating"
"""The key of a judge's rating in a reply of JSON."""
REASON_CHARS = 500


def _counted(rating: str, position: int) -> int | float:
    if not re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", rating):
        return position
    return float(rating) if "." in rating else int(rating)


class RewardSection(Section):
    """What every reward has in common."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name of its score in tables, metrics and the report."""
    weight: float = 1.0
    """Its weight in the score that is optimised; 0 measures without optimising."""

    @property
    def scorer(self) -> str:
        """What scores, by name: a model, or a function; nothing where it is the student."""
        return getattr(self, "model", None) or getattr(self, "function", None) or ""

    @property
    def loads(self) -> list[str]:
        """Names of the models that its actors load, wholly or in part."""
        return [name for field in ("model", "reference") if (name := getattr(self, field, None))]

    @property
    def engines(self) -> dict[str, Engine]:
        """Its sections of vLLM engines, by their fields."""
        return {name: value for name, value in self if isinstance(value, Engine)}


MOVED = ("batch_size", "concurrency", "dtype", "gpus")
"""Fields of a classifier that an engine's own table takes the place of."""


class ClassifierReward(RewardSection):
    """A reward model with a classification head, run through transformers."""

    kind: Literal["classifier"]
    model: Address
    """A sequence-classification model, named as in `student.model`; with one output, or `outputs`."""
    outputs: Annotated[dict[str, float], UNSAID] = Field(default_factory=dict)
    """Weights of the outputs that count, by the model's names of them (`id2label`) or their positions from `"0"` on, as
    `{ helpfulness = 1.0, verbosity = -0.2 }`: the score is their weighted sum, and each stands beside it. A weight of 0
    measures without counting."""
    dtype: Dtype = "auto"
    """Precision of its forward; `auto` as in `student.dtype`."""
    max_length: int = Field(default=1024, ge=8)
    """Most tokens that it reads, never more than it has positions for; a longer conversation keeps its last ones."""
    answer_only: bool = False
    """Score the answer by itself, without the prompt (for style and sentiment models)."""
    chat_template_kwargs: Annotated[TemplateArguments, UNSAID] = Field(default_factory=dict)
    """Further arguments of its chat template; those that it does not read are refused."""
    batch_size: Annotated[int, MEMORY] = Field(default=16, ge=1)
    """Conversations in one forward; of packed rows it is so many times `max_length` tokens, or 8,192."""
    layout: Annotated[Literal["auto", "padded"], MEMORY, UNSAID] = "auto"
    """`auto`: a decoder that can reads packed rows, in which what the answers to a prompt have in common stands once;
    `padded`: each conversation is read whole. The scores are the same."""
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
        if self.outputs and not any(self.outputs.values()):
            raise ValueError("outputs: every weight is 0; give one that counts another weight")
        if self.engine is None:
            return self
        # Not whether they are said: a resolved job says all.
        fields = type(self).model_fields
        if own := [name for name in MOVED if getattr(self, name) != fields[name].default]:
            raise ValueError(f"{min(own)}: with an engine its own table says that; move it to engine, or remove it")
        if self.max_length > self.engine.max_model_len:
            raise ValueError(
                f"max_length = {self.max_length}: engine.max_model_len = {self.engine.max_model_len} is less; "
                "raise it to that or more"
            )
        return self


class Criterion(Section):
    """One thing that a judge judges by."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name of its score, which stands beside the judge's as `JUDGE.NAME`."""
    text: str = Field(pattern=r"\S")
    """What the rubric knows as `criterion`."""
    weight: float = 1.0
    """Its weight in the mean; 0 measures without counting."""


class JudgeReward(RewardSection):
    """A language model that rates an answer by a rubric, or compares two answers."""

    kind: Literal["judge"]
    model: Address | None = None
    """The judge's model, named as in `student.model`; by default the student."""
    rubric: str
    """Template of the question put to the judge; it may use `prompt` and `answer`, or with `pairwise` `prompt`,
    `first` and `second`; with criteria it must use `criterion`."""
    criteria: Annotated[list[Criterion], UNSAID] = Field(default_factory=list)
    """What it judges by, one at a time (`[[rewards.criteria]]` tables): the score is their weighted mean, and that of
    each stands beside it. Without them the rubric says it all."""
    criteria_column: Annotated[str | None, UNSAID] = Field(default=None, min_length=1)
    """Column of the prompts with each one's own criteria: a list of texts, or of tables with `text` and `weight`; their
    scores are numbered. A row whose column is empty or something else is dropped."""
    score: Literal["expected", "written", "json"] = "expected"
    """`expected`: the mean of the ratings under the probabilities of their tokens, from one token; a judge that gives
    them hardly any probability drops the row. `written`: the rating in a reply that may reason first, with its sign and
    decimals: `[[4]]`, `Overall: 4`, `Rating: 4`, `4/5`, or the only number; ratings that differ are none. `json`: the
    `rating` of a JSON object, beside the `reason` for it; the judge can write nothing else, so that small ones rate
    too."""
    ratings: list[str] = Field(default=["1", "2", "3", "4", "5"], min_length=2)
    """The words the judge chooses from, numbers counting as their value; each one token where the score is
    `expected`, the ends of the scale where it is `written`."""
    pairwise: bool = False
    """Show two answers at a time, in both orders; the score is the mean probability of the first of two `ratings`
    for the answer that stands first, of the second for the one that stands second."""
    votes: int = Field(default=1, ge=1)
    """Replies drawn for each answer where the score is `written` or `json`; their mean counts."""
    json_schema: Annotated[dict[str, JsonValue] | None, UNSAID] = None
    """What a `json` reply is held to, a JSON schema of an object with a number `rating`; by default a `reason` of at
    most 500 characters, then a `rating` out of the `ratings`."""
    sampling: Sampling = Sampling()
    """How `written` and `json` replies are drawn."""
    chat_template_kwargs: Annotated[TemplateArguments, UNSAID] = Field(default_factory=dict)
    """Further arguments of the judge's chat template; those that it does not read are refused. A server is sent them
    too, and may leave them out without a word. Where the student judges, these are the student's, unless given. A judge
    whose template knows of thinking thinks before a `written` rating, within `sampling.max_reasoning_tokens`; a server
    has `sampling.max_tokens` for both."""
    prefill: str = ""
    """Text put into the judge's mouth before the rating, for example `Rating: `. With an `endpoint` only where its
    server can go on from it and says so: vLLM's can."""
    engine: Annotated[Engine, UNSAID] = Engine()
    """The judge's engines."""
    endpoint: Annotated[Endpoint | None, UNSAID] = None
    """A server as the judge (a `[rewards.endpoint]` table) instead of `model` and `engine`."""
    top_logprobs: Annotated[int, UNSAID] = Field(default=20, ge=1)
    """How many of its likeliest next tokens an `endpoint` is asked for where the score is `expected`; some servers give
    fewer. Ratings beyond them count as 0, or drop the row where they may move the score by a thousandth of the scale.
    vLLM's server is asked for the ratings themselves."""

    @property
    def scorer(self) -> str:
        """The judge's name, on a server too."""
        return self.endpoint.model if self.endpoint else self.model or ""

    @model_validator(mode="after")
    def _check_score(self) -> JudgeReward:
        if self.pairwise and (self.score != "expected" or len(self.ratings) != 2):
            raise ValueError('pairwise takes two `ratings`, as in ["A", "B"], and the `expected` score')
        if self.votes > 1 and (self.score == "expected" or self.sampling.temperature == 0):
            raise ValueError('votes are drawn: give score = "written" or "json", and sampling.temperature above 0')
        if self.score == "json" and self.prefill:
            raise ValueError("prefill: a reply in JSON begins with a bracket; remove it")
        if self.json_schema is not None:
            properties = self.json_schema.get("properties")
            if self.score != "json" or not (isinstance(properties, dict) and RATING in properties):
                raise ValueError(f'json_schema is that of an object with a {RATING!r}, where score = "json"')
        return self

    @property
    def reply_schema(self) -> dict[str, JsonValue]:
        """The JSON schema of a `json` reply."""
        if self.json_schema is not None:
            return self.json_schema
        # As rdpo.preference.ratings counts them: a word by its position.
        ratings: list[JsonValue] = [_counted(one, position) for position, one in enumerate(self.ratings)]
        reason: dict[str, JsonValue] = {"type": "string", "maxLength": REASON_CHARS}
        return {
            "type": "object",
            # In this order: the reason comes before the rating that it is for.
            "properties": {"reason": reason, RATING: {"enum": ratings}},
            "required": ["reason", RATING],
            "additionalProperties": False,
        }

    @model_validator(mode="after")
    def _check_criteria(self) -> JudgeReward:
        names = [criterion.name for criterion in self.criteria]
        if len(set(names)) < len(names):
            raise ValueError("criteria: two have the same name; give each its own")
        if names and self.criteria_column is not None:
            raise ValueError("criteria stand in the job already; remove them, or criteria_column")
        if names and (total := sum(criterion.weight for criterion in self.criteria)) <= 0:
            raise ValueError(f"criteria: their weights sum to {total:g}; give weights that sum to more than 0")
        return self

    @model_validator(mode="after")
    def _check_endpoint(self) -> JudgeReward:
        said = self.model_fields_set
        if self.endpoint is None:
            if "top_logprobs" in said:
                raise ValueError("top_logprobs: engines give every rating's probability; remove it, or give endpoint")
            return self
        if self.model is not None or "engine" in said:
            raise ValueError("endpoint names a judge already; remove model and engine, or endpoint")
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


class EndpointReward(RewardSection, Server):
    """A reward model behind a server: vLLM's, or one of your own."""

    kind: Literal["endpoint"]
    api: Literal["classify", "pooling", "score", "json"]
    """What it is asked. `classify`, `pooling` and `score` are those routes of vLLM's server at `url`: of one
    conversation, or with `score` of the pair of prompt and answer; the score is the head's output without an
    activation. `json`: `url` itself gets `{"items": [{"prompt": messages, "answer": text}, …]}`, the answers to one
    prompt, and replies `{"scores": [number, …]}`."""
    model: Address | None = None
    """The model's name on that server, where it asks for one."""
    tokenizer: Address | None = None
    """The reward model, named as in `student.model`, whose tokenizer and template make the tokens that are sent
    (`classify`, `pooling`), as `kind = "classifier"` reads them; of its files the weights are not needed. By default
    the server renders the messages."""
    max_length: Annotated[int, UNSAID] = Field(default=1024, ge=8)
    """Most tokens that are sent with `tokenizer`; a longer conversation keeps its last ones. Without it one that is too
    long for the server drops its row."""
    answer_only: bool = False
    """Score the answer by itself, without the prompt."""
    activation: Annotated[bool, UNSAID] = False
    """Take the output behind the head's activation (a probability, mostly) in place of the output itself."""

    @property
    def scorer(self) -> str:
        """The model's name, or where it is."""
        return self.model or self.url

    @property
    def loads(self) -> list[str]:
        """The model whose tokenizer is read."""
        return [self.tokenizer] if self.tokenizer else []

    @model_validator(mode="after")
    def _check_api(self) -> EndpointReward:
        said = self.model_fields_set
        if self.tokenizer is not None and self.api in ("score", "json"):
            raise ValueError(f'tokenizer: api = "{self.api}" takes texts, which the server renders; remove tokenizer')
        if self.tokenizer is None and "max_length" in said:
            raise ValueError("max_length: the server cuts what it renders, not rdpo; give tokenizer, or remove it")
        if self.api == "score" and self.answer_only:
            raise ValueError('answer_only: api = "score" takes prompt and answer; use "classify" for the answer alone')
        if self.api == "json" and "activation" in said:
            raise ValueError('activation: with api = "json" the server alone decides what a score is; remove it')
        return self


class FunctionReward(RewardSection):
    """A Python function `f(prompt: list[dict], answer: str, row: dict) -> float`."""

    kind: Literal["function"]
    function: Annotated[str, AfterValidator(_module_and_name)]
    """Where it is: `package.module:name`, importable from the working directory. `rdpo.rewards:instructions` comes with
    rdpo: the share of IFEval's instructions that an answer keeps, out of the prompts' columns `instruction_id_list` and
    `kwargs`."""


class TargetReward(RewardSection):
    """Answers that are prompts for a target: the worse that answers them, the better (ReverseGen, arXiv 2410.16736)."""

    kind: Literal["target"]
    reward: Annotated[ClassifierReward | JudgeReward | FunctionReward, Field(discriminator="kind")]
    """What scores the target's answers: a table `[rewards.reward]` of kind `classifier`, `judge` or `function`, which
    sees what the target was asked as the prompt. The score is the mean of its scores, negated; the mean stands beside
    it, as `NAME.` and this table's name."""
    model: Address | None = None
    """The target, named as in `student.model`; by default the student."""
    system: str | None = None
    """System message with which the target is asked."""
    samples: int = Field(default=1, ge=1)
    """How many answers to each are drawn from the target."""
    sampling: Sampling = Sampling()
    """How they are drawn. A target whose template knows of thinking thinks first, within `max_reasoning_tokens`; a
    server has `max_tokens` for both. Its reasoning is not scored."""
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    """Further arguments of the target's chat template; where the student is the target, these are the student's, unless
    given."""
    engine: Annotated[Engine, UNSAID] = Engine()
    """The target's engines."""
    endpoint: Annotated[Endpoint | None, UNSAID] = None
    """A server as the target (a `[rewards.endpoint]` table) instead of `model` and `engine`."""

    @property
    def scorer(self) -> str:
        """The target's name, on a server too, and what scores its answers."""
        target = self.endpoint.model if self.endpoint else self.model or "the student"
        return f"{target}, whose answers {self.reward.kind} {self.reward.scorer}".rstrip() + " scores"

    @property
    def loads(self) -> list[str]:
        """The target, and what scores its answers."""
        return [*super().loads, *self.reward.loads]

    @property
    def engines(self) -> dict[str, Engine]:
        """The target's, and those of what scores its answers."""
        return {**super().engines, **{f"reward.{name}": engine for name, engine in self.reward.engines.items()}}

    @model_validator(mode="after")
    def _check_target(self) -> TargetReward:
        if self.endpoint and (self.model is not None or "engine" in self.model_fields_set):
            raise ValueError("endpoint names a target already; remove model and engine, or endpoint")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError("samples are drawn: give sampling.temperature above 0, or samples = 1")
        if self.reward.weight != 1:
            raise ValueError(f"reward.weight: its scores count by the weight of {self.name}; remove it")
        if isinstance(self.reward, JudgeReward) and self.reward.pairwise:
            raise ValueError("reward.pairwise: the target's answers are scored one by one; remove it")
        return self


Reward = Annotated[
    ClassifierReward | JudgeReward | ImplicitReward | EndpointReward | FunctionReward | TargetReward,
    Field(discriminator="kind"),
]


class Calibration(Section):
    """Known pairs on which the rewards are tried before the long work."""

    source: Source | None = None
    """A preference data set, read as `prompts.source` is, with `chosen` and `rejected`; printed is how often each
    reward prefers the chosen side. By default two plain pairs, to see that every model loads and gives numbers."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many of them."""
