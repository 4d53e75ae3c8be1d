"""The whole configuration of a run: a TOML job file becomes one validated `Job`.

The sections are named after the stages and stand in the order in which data passes them. Unknown
keys are refused, and relations between fields are checked here, before any model is loaded.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from rdpo.errors import InputError


class Section(BaseModel):
    """A table of the job file: unknown keys are errors, and values are not changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Dtype = Literal["auto", "bfloat16", "float32"]
"""`auto`: bfloat16 on GPUs and on CPUs that multiply in it, else float32."""

Layout = Literal["auto", "packed", "padded"]
"""How token rows reach the model, see `Training.layout`."""


def _ordered(value: int | tuple[int, int]) -> int | tuple[int, int]:
    if isinstance(value, tuple) and value[0] > value[1]:
        raise ValueError("write it as [smallest, largest]")
    return value


Actors = Annotated[int, Field(ge=1)]
Concurrency = Annotated[Actors | tuple[Actors, Actors], AfterValidator(_ordered)]
"""Number of actors of a pool, or `[smallest, largest]`: it grows while all actors are busy and more rows wait."""

BEST, WORST = "best", "worst"

Defect = Literal["refusal", "empty_critique", "no_change_asked", "repeats_response", "quotes_critique", "preamble"]
"""What can be wrong with the teacher's turns."""


class Student(Section):
    """The model to align. It is also the reference, and its tokenizer renders the training data."""

    model: str
    """Folder, hub id (`owner/name`), `.gguf` file, or `package:NAME/FILE` inside an installed package."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Dtype = "auto"
    """Precision of the forward of reference and training; the published weights keep the model's own."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: the frozen weights under a LoRA adapter in 4 bits (QLoRA, arXiv 2305.14314), in training and reference;
    the adapter is merged into the unquantised weights. Needs `training.lora`, ZeRO stage 2 or lower, bitsandbytes."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless the job file says so."""


class Prompts(Section):
    """Where the prompts come from and how they are split."""

    source: str
    """A JSONL, Parquet or CSV file or folder, or `hf:DATASET` for a Hugging Face dataset."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    dataset_split: str = "train"
    """Which split of a Hugging Face dataset is read."""
    column: str = "prompt"
    """Column with the prompt: text (one user turn) or a list of `{role, content}` messages."""
    system: str | None = None
    """System message put before each prompt that has none."""
    templates: list[str] = []
    """Each prompt is put into one of these, drawn by its id; a template has `{{ prompt }}`, and may use the row's other
    columns. The bare prompt stays in the row as `bare`. For a jailbreak's wording around a question, for example."""
    heldout_templates: list[str] = []
    """Those of the held-out prompts; by default the same."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many rows of the source."""
    heldout_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of prompts held out for evaluation, where the source has no `split` column."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longer prompts (student's tokenizer, chat template included) are dropped, never cut."""


class Sampling(Section):
    """How answers are drawn from a model."""

    temperature: float = Field(default=0.7, ge=0)
    """0 is greedy decoding."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: keep the smallest set of tokens with this total probability. Below 1 the vocabulary is
    sorted at every step, which costs a CPU about a quarter of its speed."""
    max_tokens: int = Field(default=512, ge=1)
    """An answer that reaches this many tokens is cut off and marked `finish_reason = "length"`."""


class Engine(Section):
    """The vLLM engines of one stage."""

    concurrency: Concurrency = 1
    """Number of engine actors, or `[smallest, largest]`."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of one engine, on one node; 0 runs it on the CPU."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Into how many groups, each with some of the layers, its GPUs are divided; a group splits every layer."""
    cpus: int | None = Field(default=None, ge=1)
    """CPU cores of one engine; by default all cores of the machine without GPUs, one with them."""
    max_model_len: int = Field(default=2048, ge=16)
    """Context length of the engine, in tokens."""
    dtype: Dtype = "auto"
    """Precision of the engine."""
    kv_cache_gib: float = Field(default=2.0, gt=0)
    """Memory for the key-value cache of an engine on the CPU, in GiB."""
    batch_rows: int = Field(default=16, ge=1)
    """Rows in one block of work; the rows of `batches_in_flight` blocks are in the engine at once."""
    batches_in_flight: int = Field(default=4, ge=1)
    """Blocks that one engine works on at the same time."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's `AsyncEngineArgs`, passed on as they are (`quantization`, for example)."""

    @model_validator(mode="after")
    def _check_groups(self) -> Engine:
        if max(self.gpus, 1) % self.pipeline_parallel:
            raise ValueError(f"gpus = {self.gpus} cannot be divided into pipeline_parallel = {self.pipeline_parallel}")
        return self


class Endpoint(Section):
    """An OpenAI-compatible server as the teacher (a vLLM server, a hosted model), in place of engines."""

    url: str = Field(pattern=r"^https?://[^@?\s]+$")
    """Base of its API, for example `http://teacher:8000/v1`; a key does not belong here."""
    model: str
    """The model's name on that server."""
    key_variable: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the key, where the run is started; without one the server gets `none`."""
    concurrency: int = Field(default=16, ge=1)
    """Requests at the same time."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Requests begun per minute at most, repeated ones among them."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds until a request without an answer counts as failed."""
    retries: int = Field(default=5, ge=0)
    """How often a failed request is made again."""
    pause_s: float = Field(default=1.0, gt=0)
    """First pause before that, in seconds; it doubles each time. A server that asks for longer gets it."""
    price_per_million: tuple[float, float] = (0.0, 0.0)
    """Price of a million tokens read and a million written, for the cost in the manifest."""


class Synthesis(Section):
    """Who answers, critiques and revises, and in which words."""

    task: str | None = None
    """Task file with the templates of the turns; a path, or the name of one that ships with rdpo. Without one
    nothing is synthesised: the source of the prompts is a preference data set, with the columns `chosen`
    and `rejected`, perhaps `score_chosen` and `score_rejected`."""
    values: dict[str, str] = Field(default_factory=dict)
    """Words that the task's templates use by name, the style of a counterfactual task for example."""
    split: str = "train"
    """Which split of the prompts is trained on."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many prompts, the first by id."""
    teacher: str | None = None
    """The teacher's model, named as in `student.model`; by default the student itself."""
    adapter: str | None = None
    """Folder of a LoRA adapter that the teacher wears."""
    endpoint: Endpoint | None = None
    """A server as the teacher (a `[synthesis.endpoint]` table) instead of `teacher` and `engine`."""
    sampling: Sampling = Sampling()
    """How the teacher's turns are sampled."""
    engine: Engine = Engine()
    """The teacher's engines."""


class RewardSection(Section):
    """What every reward has in common."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name of its score in tables, metrics and the report."""
    weight: float = 1.0
    """Its weight in the score that is optimised; 0 measures without optimising."""


class ClassifierReward(RewardSection):
    """A reward model with a classification head, run through transformers."""

    kind: Literal["classifier"]
    model: str
    """A sequence-classification model with one output, named as in `student.model`."""
    dtype: Dtype = "auto"
    """Precision of its forward."""
    max_length: int = Field(default=1024, ge=8)
    """Longer conversations keep their last tokens."""
    answer_only: bool = False
    """Score the answer by itself, without the prompt (for style and sentiment models)."""
    batch_size: int = Field(default=16, ge=1)
    """Conversations in one forward."""
    concurrency: Concurrency = 1
    """Number of reward actors, or `[smallest, largest]`."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of one actor; a fraction shares a GPU."""


class JudgeReward(RewardSection):
    """A language model that rates an answer by a rubric, or compares two answers."""

    kind: Literal["judge"]
    model: str | None = None
    """The judge's model, named as in `student.model`; by default the student."""
    rubric: str
    """Template of the question put to the judge; it may use `prompt` and `answer`, or with `pairwise` `prompt`,
    `first` and `second`."""
    score: Literal["expected", "written"] = "expected"
    """`expected`: the mean of the ratings under the probabilities of their tokens, from one token; `written`: the
    rating at the end of a reply that may reason first, with its sign and decimals."""
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


class ImplicitReward(RewardSection):
    """DPO's implicit reward of a trained model against the model it was trained from (arXiv 2406.09760)."""

    kind: Literal["implicit"]
    model: str | None = None
    """The trained model, named as in `student.model`, with its adapter merged; by default the student."""
    reference: str | None = None
    """The model it was trained from; by default the student. Both have the same tokenizer."""
    beta: float = Field(default=0.1, gt=0)
    """The beta it was trained with."""
    normalization: Literal["sum", "token_mean"] = "sum"
    """Log-ratio of the whole answer, or its mean per token."""
    dtype: Dtype = "auto"
    """Precision of both forwards."""
    tokens_per_batch: int = Field(default=4096, ge=32)
    """Token budget of one forward."""
    concurrency: Concurrency = 1
    """Number of reward actors, or `[smallest, largest]`."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of one actor, which holds both models."""

    @model_validator(mode="after")
    def _check_models(self) -> ImplicitReward:
        if self.model is None and self.reference is None:
            raise ValueError("the student against itself is 0 everywhere; give model, or the reference it came from")
        return self


class FunctionReward(RewardSection):
    """A Python function `f(prompt: list[dict], answer: str, row: dict) -> float`."""

    kind: Literal["function"]
    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """Where it is: `package.module:name`, importable from the working directory."""


Reward = Annotated[ClassifierReward | JudgeReward | ImplicitReward | FunctionReward, Field(discriminator="kind")]


class Calibration(Section):
    """Known pairs on which the rewards are tried before the long work."""

    source: str | None = None
    """A preference data set, read as `prompts.source` is, with `chosen` and `rejected`; printed is how often each
    reward prefers the chosen side. By default two plain pairs, to see that every model loads and gives numbers."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many of them."""


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
    """Drop rows with fewer usable ones: those that `min_answer_chars` and `drop_truncated` would not drop."""
    length_coef: float | Literal["auto"] = 0.0
    """What a character costs a sample in the choice of `best` and `worst`; `auto`: so much that chosen answers are
    on average as long as rejected ones (DICE, arXiv 2406.09760)."""
    also: list[Sides] = []
    """Further pairs from each row, as `[{ chosen = "control", rejected = "negative" }]`."""
    condition: str | None = None
    """The turn whose question becomes the pair's prompt; by default the prompt itself, whatever was asked to get the
    answers."""
    direction: Literal["teacher", "reward"] = "teacher"
    """`teacher`: chosen is as named above; `reward`: the answer with the higher score is chosen."""
    min_gap: float | None = None
    """Drop pairs with `score_chosen - score_rejected` below this."""
    min_answer_chars: int = Field(default=1, ge=1)
    """Drop pairs with a shorter answer."""
    drop_defects: list[Defect] = []
    """Drop rows with these defects of the teacher's turns, see `rdpo.synthesis.defects`; all are counted anyway."""
    heldout_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompts whose pairs are not trained on, and not flipped: after training it is measured how often
    the model prefers their chosen side."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Share of the pairs whose sides change places, scores and all: noise in the teacher's direction, to see what a
    method makes of it."""
    drop_truncated: Literal["never", "chosen", "any"] = "never"
    """Drop pairs whose chosen answer (or either) was cut off at the token limit."""


class Replay(Section):
    """Ready preference pairs that are trained on beside the generated ones (DICE, arXiv 2406.09760)."""

    source: str
    """A preference data set, read as `prompts.source` is, with `chosen` and `rejected`; the `pairs` folder of
    another run is one."""
    share: float = Field(default=0.5, ge=0, le=1)
    """Gamma: their share of the pairs that are trained on."""
    column: str = "prompt"
    """Their column with the prompt."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many of them."""


class Reference(Section):
    """The cached log-probs of the reference, computed by the forward that training uses."""

    concurrency: Concurrency = 1
    """Number of reference actors, or `[smallest, largest]`."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of one actor."""
    cpus: int | None = Field(default=None, ge=1)
    """CPU cores of one actor; by default all cores of the machine without GPUs, one with them."""
    max_length: int = Field(default=1024, ge=16)
    """Pairs with a longer prompt and completion together (tokens) are dropped, never cut."""
    tokens_per_batch: int = Field(default=4096, ge=32)
    """Token budget of one forward, padding included."""


class Lora(Section):
    """Low-rank adapters; the reference is the model with the adapter switched off."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input; above 0 the log-probs of training become random."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter, as in peft."""


PER_RATIO = {"normalization", "length_coef", "margin", "offset", "weight"}
LOSS_OPTIONS = {
    "dpo": PER_RATIO | {"label_smoothing", "soft_label", "geometric_label"},
    "robust": PER_RATIO | {"label_smoothing", "geometric_label"},
    "hinge": PER_RATIO | {"geometric_label"},
    "ipo": PER_RATIO | {"geometric_label"},
    "regression": PER_RATIO,
    "simpo": {"label_smoothing", "length_coef", "margin", "offset", "weight", "soft_label", "geometric_label"},
    "orpo": {"label_smoothing", "offset", "weight", "soft_label"},
    "sppo": {"label_smoothing", "weight", "soft_label"},
    "kto": {"reference_point", "offset", "weight"},
    "bco": {"reference_point", "weight"},
    "sft": {"weight"},
}
"""What each loss takes besides beta and sft_coef: options, and ways in which the reward gap can enter."""

REWARD_USES = {"offset", "soft_label", "geometric_label", "weight"}
OPTIONS_AT_REST = {
    "normalization": "sum",
    "label_smoothing": 0.0,
    "length_coef": 0.0,
    "margin": 0.0,
    "reference_point": 0.0,
}


class Loss(Section):
    """The preference loss, see `rdpo.training.losses`: a shape, and how the external reward enters it."""

    loss: Literal["dpo", "robust", "hinge", "ipo", "regression", "simpo", "orpo", "sppo", "kto", "bco", "sft"] = "dpo"
    """Score and shape; `dpo` with an offset is refined DPO, `sft` trains on the chosen answers alone."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference (ipo: tau; sppo: 1 / eta; orpo: lambda)."""
    normalization: Literal["sum", "token_mean"] = "sum"
    """Log-ratios of whole answers, or their means per token."""
    reward_as: Literal["auto", "offset", "soft_label", "geometric_label", "weight", "none"] = "auto"
    """How the external reward gap enters: `offset` lowers the logit by `offset_coef * gap`; `soft_label` makes
    sigmoid(gap / reward_temperature) the probability that the label is right; `geometric_label` scales
    beta by 2 p - 1; `weight` weighs the pair by p; `none`: not at all; `auto`: offset where the loss takes it."""
    offset_coef: float = Field(default=1.0, ge=0)
    """Lambda: weight of the external reward gap in the offset; 0 is the plain loss."""
    offset_transform: Literal["identity", "log"] = "identity"
    """`log` is ODPO's; gaps of at most 0 count as 1e-6 there."""
    reward_norm: Literal["none", "zscore", "range01"] = "none"
    """Scale of the reward gap: as it is, divided by its standard deviation, or by its largest size."""
    reward_temperature: float = Field(default=1.0, gt=0)
    """Gap at which a soft label, geometric label or weight is sigmoid(1) = 0.73."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped pairs (dpo: conservative DPO)."""
    length_coef: float = Field(default=0.0, ge=0)
    """R-DPO's alpha, per token: a longer chosen answer must win by more."""
    margin: float = 0.0
    """A constant offset (simpo: gamma itself, not gamma / beta)."""
    reference_point: float = 0.0
    """kto: z0, nats of log-ratio; bco: the shift of the rewards."""
    sft_coef: float = Field(default=0.0, ge=0)
    """Weight of the mean negative log-likelihood of the chosen tokens, added to the loss (RPO)."""

    @model_validator(mode="after")
    def _check_options(self) -> Loss:
        takes = LOSS_OPTIONS[self.loss]
        if self.reward_as not in {"auto", "none", *takes}:
            raise ValueError(f"loss {self.loss} takes reward_as {', '.join(sorted(takes & REWARD_USES))} or none")
        for name, at_rest in OPTIONS_AT_REST.items():
            if getattr(self, name) != at_rest and name not in takes:
                raise ValueError(f"loss {self.loss} does not take {name}; remove it")
        return self

    @property
    def reward_use(self) -> str:
        """`reward_as` made definite."""
        if self.reward_as != "auto":
            return self.reward_as
        return "offset" if "offset" in LOSS_OPTIONS[self.loss] else "none"


class Training(Loss):
    """The rDPO training by Ray Train and DeepSpeed."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the pairs."""
    max_steps: int | None = Field(default=None, ge=0)
    """Stop after so many optimizer steps; 0 trains nothing, and the start model goes on as it is."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs in one optimizer step, over all workers."""
    tokens_per_batch: int = Field(default=4096, ge=16)
    """Token budget of one forward on one worker, padding included; a pair is never split."""
    learning_rate: float = Field(default=5e-6, gt=0)
    """Peak learning rate of AdamW; LoRA wants about 10 times that of full fine-tuning."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""
    lora: Lora | None = None
    """Train adapters (a `[training.lora]` table) instead of all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """DeepSpeed ZeRO stage: what is partitioned over the workers. 0 is for float32; in bfloat16 it means 1."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep optimizer state (and parameters) in CPU memory; for GPU training."""
    num_workers: int = Field(default=1, ge=1)
    """Training processes; on GPUs one for each."""
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    """1 trains on GPUs over NCCL, 0 on the CPU over gloo."""
    cpus_per_worker: int | None = Field(default=None, ge=1)
    """CPU cores of one worker; by default its share of a lone machine's cores; one beside a GPU, or on a cluster."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Optimizer steps between two checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the last checkpoints are kept."""
    max_skipped_steps: int = Field(default=0, ge=0)
    """Optimizer steps that may be left out because their loss or gradient is not finite; one more stops the run
    and names the rows."""
    max_failures: int = Field(default=3, ge=-1)
    """Worker failures that are repaired from the last checkpoint; -1 is without limit."""
    logprob_chunk: int = Field(default=1024, ge=1)
    """Completion tokens whose logits exist at the same time."""
    layout: Layout = "auto"
    """`packed`: one row without padding, each prompt once for both its answers; `padded`: a row for each
    sequence; `auto`: packed where the architecture can."""


class Evaluation(Section):
    """Held-out prompts answered by the start model and the trained one, and compared."""

    limit: int | None = Field(default=None, ge=1)
    """At most so many held-out prompts, the first by id."""
    condition: str | None = None
    """The turn of the task whose question is asked; by default the prompt itself."""
    refine: bool = False
    """The trained model's answer goes through the turns of the task, and the one that `pairs.chosen` names counts:
    self-refinement at inference. With `training.max_steps = 0` that is the baseline that trains nothing."""
    sampling: Sampling = Sampling()
    """How both models answer."""
    engine: Engine = Engine()
    """The engines of both models."""
    samples: int = Field(default=20, ge=0)
    """Prompts whose answers are shown side by side in the report."""


class Rounds(Section):
    """The whole run several times, each time from the model that the last one made (`rdpo run` does it)."""

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
    """Merge a LoRA adapter into the weights; the adapter is kept in `model/adapter` in any case."""
    max_shard_gb: float = Field(default=4.0, gt=0)
    """Size of one safetensors file."""
    license: str | None = None
    """Licence named on the model card."""


class Cluster(Section):
    """The Ray cluster the run uses."""

    address: str | None = None
    """Address of a running cluster; by default the one in RAY_ADDRESS, else a local one is started.
    `auto` finds the one that `ray start` began on this machine."""
    object_store_gib: float = Field(default=1.0, gt=0)
    """Memory of the object store of a local cluster, in GiB."""
    streaming: Literal["auto", "on", "off"] = "auto"
    """Whether rewards score the first rows while the teacher still writes the last. `auto`: where every model has
    GPUs of its own, or only one runs on the CPU; `off`: one model after the other, on a machine that holds one."""


class Job(Section):
    """One job file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its directory is `runs/NAME` unless `--run-dir` says otherwise."""
    seed: int = Field(default=0, ge=0)
    """All random draws are functions of this seed and of what they are for."""
    student: Student
    prompts: Prompts
    synthesis: Synthesis = Synthesis()
    rewards: list[Reward] = []
    """The external rewards; at least one, unless the pairs come with the prompts."""
    calibration: Calibration = Calibration()
    pairs: Pairs = Pairs()
    replay: Replay | None = None
    reference: Reference = Reference()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    rounds: Rounds = Rounds()
    publish: Publish = Publish()
    cluster: Cluster = Cluster()

    @model_validator(mode="before")
    @classmethod
    def _name_given_answers(cls, table: Any) -> Any:
        synthesis = table.get("synthesis", {}) if isinstance(table, dict) else None
        if not isinstance(synthesis, dict) or synthesis.get("task") is not None:
            return table
        pairs = table.get("pairs", {})
        return {**table, "pairs": {"chosen": "chosen", "rejected": "rejected", **pairs}}

    @model_validator(mode="after")
    def _check_rewards(self) -> Job:
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError("rewards: two rewards have the same name; give each its own `name`")
        if self.synthesis.task and not self.rewards:
            raise ValueError("rewards: give at least one; only a ready preference data set can do without")
        if self.rewards and not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards: every weight is 0; give the optimised reward a weight above 0")
        if self.rounds.watch not in {"optimised", *names}:
            raise ValueError(
                f"rounds: watch = {self.rounds.watch!r} is no reward; there are {', '.join(names)}, optimised"
            )
        return self

    @model_validator(mode="after")
    def _check_relations(self) -> Job:
        if self.evaluation.refine and not self.synthesis.task:
            raise ValueError("evaluation: refine speaks the turns of a task; give synthesis.task")
        if self.synthesis.endpoint and (self.synthesis.teacher or self.synthesis.adapter):
            raise ValueError("synthesis: endpoint names a teacher already; remove teacher and adapter, or endpoint")
        if self.pairs.chosen == self.pairs.rejected:
            raise ValueError("pairs: chosen and rejected name the same turn; name two turns of the task")
        for section in ("reference", "training"):
            if getattr(self, section).tokens_per_batch < 2 * self.reference.max_length:
                raise ValueError(
                    f"{section}: tokens_per_batch must hold one pair, so at least twice "
                    f"reference.max_length = {2 * self.reference.max_length}"
                )
        if self.student.quantization != "none" and (self.training.lora is None or self.training.zero_stage == 3):
            raise ValueError(
                "student: quantization trains an adapter over weights that are not partitioned; "
                "give training.lora, and training.zero_stage 2 or lower"
            )
        if self.training.batch_size < self.training.num_workers:
            raise ValueError(
                f"training: batch_size {self.training.batch_size} is below num_workers "
                f"{self.training.num_workers}; each worker needs at least one pair in a step"
            )
        return self


def load_job(path: str | Path, overrides: list[str] | None = None) -> Job:
    """Read a job file, apply `section.key=value` overrides, validate.

    Raises:
        InputError: the file is missing, not TOML, or a key or value is wrong; names file and field.
    """
    table = read_toml(path)
    for override in overrides or []:
        _apply_override(table, override)
    return job_of(table, str(path))


def job_of(table: dict[str, Any], where: str) -> Job:
    """The job that a table describes.

    Raises:
        InputError: a key or value is wrong; names `where` the table is from, and the field.
    """
    try:
        return Job.model_validate(table)
    except ValidationError as error:
        raise InputError(explained(where, error)) from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        InputError: it is missing or not TOML.
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such job file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None


def to_toml(job: Job) -> str:
    """The resolved job as TOML; `load_job` reads it back."""
    import tomli_w

    return tomli_w.dumps(job.model_dump(mode="json", exclude_none=True))


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {override}: write it as section.key=value")
    *sections, last = key.strip().split(".")
    target: Any = table
    for section in sections:
        target = _descend(target, section, override)
    if isinstance(target, list):
        raise InputError(f"--set {override}: name an entry of the list, as in rewards.0.weight=1")
    target[last] = _toml_value(text)


def _descend(target: Any, section: str, override: str) -> Any:
    if isinstance(target, list):
        if not section.isdigit() or int(section) >= len(target):
            raise InputError(f"--set {override}: the list has entries 0 to {len(target) - 1}")
        return target[int(section)]
    child = target.setdefault(section, {})
    if not isinstance(child, dict | list):
        raise InputError(f"--set {override}: {section} is a value, not a section")
    return child


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def explained(where: str | Path, error: ValidationError) -> str:
    """What is wrong with a table, field by field."""
    lines = [f"{where}: {len(error.errors())} problem(s) in the job file"]
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        lines.append(f"  {field or 'job'}: {_remedy(problem, field)}")
    return "\n".join(lines)


def _remedy(problem: Any, field: str) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"unknown key; remove it or correct its name{_suggestion(field)}"
    if problem["type"] == "missing":
        return "is required"
    if field.endswith("endpoint.url"):
        return "a URL like http://teacher:8000/v1, without a key in it"
    value = repr(problem.get("input"))
    return f"{message} (got {value[:80]})" if len(value) < 200 else message


def _suggestion(field: str) -> str:
    from difflib import get_close_matches

    section, _, key = field.rpartition(".")
    known = _known_keys(section)
    close = get_close_matches(key, known, n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def _known_keys(section: str) -> list[str]:
    model: Any = Job
    for part in section.split(".") if section else []:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        options = getattr(field.annotation, "__args__", (field.annotation,))
        model = next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)
    return list(getattr(model, "model_fields", {}))
