"""The preference loss and its training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rdpo.config.section import MEMORY, PLACEMENT, UNSAID, Address, Concurrency, Layout, Section


class Lora(Section):
    """Low-rank adapters; the reference is the model with the adapter switched off."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input; above 0 the log-probs of training become random."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: `all-linear`, or names as in peft."""


class TokenWeights(Section):
    """Which tokens of a pair's answers count more or less in their log-probs, policy's and reference's alike."""

    kind: Literal["ddpo", "ld_dpo"]
    """`ddpo`: those that differ between the two answers (RLHF-V, arXiv 2312.00849): what a revision has changed.
    `ld_dpo`: those beyond the length of the other answer (LD-DPO, arXiv 2409.06411)."""
    weight: float = Field(gt=0)
    """What such a token weighs where all others weigh 1; DDPO has 5, LD-DPO below 1."""


PER_RATIO = {"normalization", "length_coef", "margin", "offset", "weight", "policy_weight"}
LOSS_OPTIONS = {
    "dpo": PER_RATIO | {"label_smoothing", "soft_label", "geometric_label"},
    "robust": PER_RATIO | {"label_smoothing", "geometric_label"},
    "hinge": PER_RATIO | {"geometric_label"},
    "ipo": PER_RATIO | {"geometric_label"},
    "regression": PER_RATIO,
    "simpo": PER_RATIO - {"normalization"} | {"label_smoothing", "soft_label", "geometric_label"},
    "orpo": {"label_smoothing", "offset", "weight", "soft_label"},
    "sppo": {"label_smoothing", "weight", "soft_label"},
    "kto": {"reference_point", "offset", "weight"},
    "bco": {"reference_point", "weight"},
    "exo": PER_RATIO | {"label_smoothing", "geometric_label"},
    "apo_zero": {"weight"},
    "apo_down": {"weight"},
    "sft": {"weight"},
    "plackett_luce": {"offset"},
    "infonca": set(),
    "nca": set(),
    "selm": {"offset", "exploration_coef"},
}
"""What each loss takes besides beta and sft_coef: options, and ways in which the reward gap can enter."""

LossName = Literal[
    "dpo",
    "robust",
    "hinge",
    "ipo",
    "regression",
    "simpo",
    "orpo",
    "sppo",
    "kto",
    "bco",
    "exo",
    "apo_zero",
    "apo_down",
    "sft",
    "plackett_luce",
    "infonca",
    "nca",
    "selm",
]

NEED_SCORES = {"infonca", "nca", "soft_label", "geometric_label", "weight"}
"""Losses, and ways for the reward gap to enter, to which a pair without scores would be a tie of equals."""

REWARD_USES = {"offset", "soft_label", "geometric_label", "weight"}
OPTIONS_AT_REST = {
    "normalization": "sum",
    "label_smoothing": 0.0,
    "length_coef": 0.0,
    "margin": 0.0,
    "reference_point": 0.0,
    "exploration_coef": 0.0,
    "policy_weight": "none",
}


class Loss(Section):
    """The preference loss, see `rdpo.training.losses`: a shape, and how the external reward enters it."""

    loss: LossName = "dpo"
    """Score and shape; `dpo` with an offset is refined DPO, `sft` trains on the chosen answers alone. The last four
    are losses of groups (`pairs.others`); on a group any other is the mean over its chosen answer with each other one.
    `plackett_luce` is rDPO over the whole order; `infonca` and `nca` go by the scores, with `reward_temperature`;
    `selm` explores, with an answer between the two that was drawn greedily."""
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
    """Scale of the reward gap: as it is, divided by its standard deviation over all pairs, or by its largest size."""
    reward_temperature: float = Field(default=1.0, gt=0)
    """Gap at which a soft label, geometric label or weight is sigmoid(1) = 0.73."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped pairs (dpo: conservative DPO)."""
    length_coef: float = Field(default=0.0, ge=0)
    """R-DPO's alpha, per token of difference: where the chosen answer is the longer one, its length explains part of
    the preference, and less is learnt."""
    margin: float = 0.0
    """A constant part of the offset, before beta (simpo: gamma itself, not gamma / beta)."""
    reference_point: float = 0.0
    """kto: z0, nats of log-ratio; bco: the shift of the rewards."""
    exploration_coef: Annotated[float, UNSAID] = Field(default=0.0, ge=0)
    """selm: alpha, how much less likely an answer becomes that the start model gives anyway, 0.001 to 0.0001."""
    policy_weight: Annotated[Literal["none", "wpo"], UNSAID] = "none"
    """`wpo`: a pair weighs less the less its answers are like those that the policy would draw itself (WPO, arXiv
    2406.11827); the term of `sft_coef` is not weighed."""
    sft_coef: float = Field(default=0.0, ge=0)
    """Weight of the mean negative log-likelihood of the chosen tokens, added to the loss (RPO)."""

    shuffle_rewards: Annotated[bool, UNSAID] = False
    """A negative control: every pair gets the reward gap of another one, drawn by the seed. What an arm with it still
    gains is not the reward's doing."""
    token_weights: Annotated[TokenWeights | None, UNSAID] = None
    """Weights of tokens, as `{ kind = "ddpo", weight = 5.0 }`; by default all are 1."""

    @model_validator(mode="after")
    def _check_options(self) -> Loss:
        takes = LOSS_OPTIONS[self.loss]
        if self.reward_as not in {"auto", "none", *takes}:
            raise ValueError(f"loss {self.loss} takes reward_as {', '.join(sorted(takes & REWARD_USES))} or none")
        for name, at_rest in OPTIONS_AT_REST.items():
            if getattr(self, name) != at_rest and name not in takes:
                raise ValueError(f"loss {self.loss} does not take {name}; remove it")
        if self.loss == "selm" and not self.exploration_coef:
            raise ValueError("loss selm: without exploration_coef it is dpo; give it, 0.001 for example")
        if self.loss == "exo" and not self.label_smoothing:
            raise ValueError("loss exo: with certain labels it is infinite; give label_smoothing, 0.001 for example")
        if self.shuffle_rewards and self.reward_use == "none" and not self.needs_scores:
            raise ValueError("shuffle_rewards changes nothing where no reward enters the loss; remove it")
        if self.loss == "plackett_luce" and self.offset_transform != "identity":
            raise ValueError("loss plackett_luce adds up offsets, which logarithms do not; remove offset_transform")
        return self

    @property
    def reward_use(self) -> str:
        """`reward_as` made definite."""
        if self.reward_as != "auto":
            return self.reward_as
        return "offset" if "offset" in LOSS_OPTIONS[self.loss] else "none"

    @property
    def needs_scores(self) -> bool:
        """Whether a pair without scores would be trained on as if its two answers were equally good.

        An offset does without: where nothing scored the answers it is 0, and the loss that of the order alone.
        """
        return bool(NEED_SCORES & {self.loss, self.reward_use})


class Training(Loss):
    """The rDPO training by Ray Train and DeepSpeed."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the pairs."""
    max_steps: int | None = Field(default=None, ge=0)
    """Stop after so many optimizer steps; 0 trains nothing, and the start model goes on as it is."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs in one optimizer step, over all workers."""
    tokens_per_batch: Annotated[int, MEMORY] = Field(default=4096, ge=16)
    """Token budget of one forward on one worker, padding included; a pair is never split."""
    row_weights: Annotated[Address | None, UNSAID] = None
    """What the loss of each row is multiplied with: a file of JSON lines, `{"prompt_id": "…", "weight": 1.0}` for every
    row that is trained on. A step's loss is still divided by the number of its rows. Training then leaves the loss of
    each row, without its weight, in `training/row_losses.jsonl`. By default all rows count alike."""
    learning_rate: float = Field(default=5e-6, gt=0)
    """Peak learning rate of AdamW; LoRA wants about 10 times that of full fine-tuning."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to 0 after the warm-up; `constant` is none."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""
    lora: Lora | None = None
    """Train adapters (a `[training.lora]` table) instead of all weights."""
    gradient_checkpointing: Annotated[bool, MEMORY] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile_layers: Annotated[bool, MEMORY, UNSAID] = False
    """Let torch compile the decoder layers around their attention, and what is done to logits, for long trainings: the
    first step takes a minute or more longer. Not with `zero_stage` 3, which gathers weights within layers."""
    mlp_tile: Annotated[int | None, MEMORY, UNSAID] = Field(default=None, ge=1)
    """For rows longer than a card holds: tokens that a layer's MLP reads at a time. Its inner states are then made
    again in the backward pass (tiled MLP, arXiv 2506.13996). Not with `compile_layers`."""
    offload_activations: Annotated[bool, MEMORY, UNSAID] = False
    """What GPU training keeps of the layers under `gradient_checkpointing`, the input of each, lies in CPU memory until
    the backward pass (arXiv 2506.13996)."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """DeepSpeed ZeRO stage, what is partitioned over the workers: 1 the optimizer state, 2 the gradients too, 3 the
    weights too. 0 is for float32; in bfloat16 it means 1."""
    offload: Annotated[Literal["none", "optimizer", "all"], MEMORY] = "none"
    """What GPU training keeps in CPU memory: the optimizer state (from `zero_stage` 1 on), or with `all` the weights
    too (`zero_stage` 3)."""
    num_workers: Annotated[Concurrency, PLACEMENT] = 1
    """Training processes, on GPUs one for each; or `[smallest, largest]`: as many as the cluster has room for,
    which may change while training runs. A run may go on with another number."""
    gpus_per_worker: Annotated[int, PLACEMENT] = Field(default=0, ge=0, le=1)
    """1 trains on GPUs over NCCL, 0 on the CPU over gloo."""
    cpus_per_worker: Annotated[int | None, PLACEMENT] = Field(default=None, ge=1)
    """CPU cores of one worker; by default its share of a lone machine's cores; one beside a GPU, or on a cluster."""
    checkpoint_every: Annotated[int, PLACEMENT] = Field(default=50, ge=1)
    """Optimizer steps between two checkpoints."""
    keep_checkpoints: Annotated[int, PLACEMENT] = Field(default=2, ge=1)
    """How many checkpoints are kept: the last ones; with `select = "best"` the best ones, and the last."""
    select: Literal["last", "best"] = "last"
    """Which weights leave training: those of the last step, or of the step after which the held-out pairs
    (`pairs.heldout_fraction`) are most likely. They are measured at every checkpoint and at the end."""
    max_skipped_steps: Annotated[int, MEMORY] = Field(default=0, ge=0)
    """Optimizer steps that may be left out because their loss or gradient is not finite; one more stops the run
    and names the rows."""
    extrapolation: float = Field(default=0.0, gt=-1)
    """ExPO's alpha (arXiv 2404.16792): how much further than training moved it the policy is moved at the end. Below 0
    it is moved back: -0.5 is the mean of the weights before and after."""
    max_failures: Annotated[int, PLACEMENT] = Field(default=3, ge=-1)
    """Worker failures that are repaired from the last checkpoint; -1 is without limit."""
    hang_after_s: Annotated[float, PLACEMENT] = Field(default=1800.0, gt=0)
    """Seconds without an optimizer step after which training counts as hanging: the worker that holds it up is
    named, and training resumes from the last checkpoint."""
    logprob_chunk: Annotated[int, MEMORY] = Field(default=1024, ge=1)
    """Completion tokens whose logits exist at the same time."""
    layout: Annotated[Layout, MEMORY] = "auto"
    """`packed`: one row without padding, each prompt once for both its answers; `padded`: a row for each
    sequence; `auto`: packed where the architecture can."""

    @model_validator(mode="after")
    def _check_long_rows(self) -> Training:
        if self.compile_layers and self.mlp_tile:
            raise ValueError(
                "mlp_tile: compile_layers compiles a layer once for rows of all lengths, which have other numbers of "
                "tiles; remove one of the two"
            )
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError(
                "offload_activations: without gradient_checkpointing far more is kept than a CPU can take in time; set "
                "gradient_checkpointing = true too"
            )
        return self

    @model_validator(mode="after")
    def _check_compiled(self) -> Training:
        if self.compile_layers and self.zero_stage == 3:
            raise ValueError(
                "compile_layers: with zero_stage 3 the weights of a layer are gathered within it, where nothing can be "
                "compiled across; set zero_stage to 2 or lower, or remove compile_layers"
            )
        return self
