"""A whole job: its sections, in the order in which data passes them, and the relations between them."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from rdpo.config.annotators import Annotators, check_annotators
from rdpo.config.evaluation import Evaluation, Publish, Retention, Rounds
from rdpo.config.models import Student
from rdpo.config.pairs import Pairs, Reference, Replay
from rdpo.config.prompts import Prompts, Synthesis
from rdpo.config.rewards import Calibration, Reward, TargetReward
from rdpo.config.section import UNSAID, Address, Section, largest
from rdpo.config.selection import Selection
from rdpo.config.suites import Suite
from rdpo.config.tracking import Tracking
from rdpo.config.training import Training
from rdpo.errors import did_you_mean

RESOURCES = {"CPU", "GPU", "TPU", "memory", "object_store_memory"}
"""What Ray counts on every node; anything else is a custom resource."""


TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""The day that the chat templates of Llama 3.1 and 3.2 write where nobody tells them another."""


def _not_a_resource(name: str) -> str:
    if name in RESOURCES:
        raise ValueError("every node has that; name a custom resource that only its nodes declare")
    return name


Kind = Annotated[str, Field(pattern=r"^[A-Za-z][\w:.-]*$"), AfterValidator(_not_a_resource)]
"""A kind of node, by a custom resource that its nodes declare; `accelerator_type:H100` is one that Ray declares."""


class Placement(Section):
    """Which work runs on which nodes; by default all of it anywhere."""

    teacher: Kind | None = None
    """The engines that write: the teacher's, and those of the evaluation."""
    reward: Kind | None = None
    """Rewards that hold a model."""
    trainer: Kind | None = None
    """Training, and the forward of reference and divergence."""


class Cluster(Section):
    """The Ray cluster the run uses."""

    address: Address | None = None
    """Address of a running cluster; by default the one in RAY_ADDRESS, else a local one is started.
    `auto` finds the one that `ray start` began on this machine."""
    object_store_gib: float = Field(default=1.0, gt=0)
    """Memory of the object store of a local cluster, in GiB."""
    streaming: Literal["auto", "on", "off"] = "auto"
    """Whether rewards score the first rows while the teacher still writes the last. `auto`: where every model has
    GPUs of its own, or only one runs on the CPU; `off`: one model after the other, on a machine that holds one."""

    placement: Placement = Placement()
    """Kinds of nodes, by what runs on them. A node declares its kind, as in `ray start --resources='{"teacher": 1}'`;
    it changes no result, and a run may go on with another one."""


class Job(Section):
    """One job file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its directory is `runs/NAME` unless `--run-dir` says otherwise."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """All random draws are functions of this seed and of what they are for."""
    date: datetime.date = TEMPLATE_DATE
    """The day given to chat templates that write today's date (Llama 3.2, gpt-oss). It is the same for the whole run,
    all its rounds and all arms, whatever day they run on. Other templates do not depend on it."""
    student: Student
    prompts: Prompts
    synthesis: Synthesis = Synthesis()
    selection: Selection | None = None
    rewards: list[Reward] = Field(default_factory=list)
    """The external rewards; at least one, unless the pairs come with the prompts."""
    calibration: Calibration = Calibration()
    pairs: Pairs = Pairs()
    replay: Replay | None = None
    annotators: Annotated[Annotators | None, UNSAID] = None
    reference: Reference = Reference()
    training: Training = Training()
    retention: Retention | None = None
    evaluation: Evaluation = Evaluation()
    suites: list[Suite] = Field(default_factory=list)
    """Further prompts on which both models are measured without a judge; `rdpo prove` measures them afterwards too."""
    rounds: Rounds = Rounds()
    publish: Publish = Publish()
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()

    def model_or_student(self, name: str | None) -> tuple[str, str | None, bool, str | None]:
        """Name, revision, whether its own code may run, and adapter: of the model named, or of the student.

        One that is named has no adapter, and its code may not run.
        """
        if name:
            return name, None, False, None
        return self.student.model, self.student.revision, self.student.trust_remote_code, self.student.adapter

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained, a new one or the student's, and not all weights."""
        return self.training.lora is not None or self.student.continues

    @property
    def fits_types(self) -> bool:
        """Whether this is the job of a whole mixture of annotators' types, and not of one policy with given weights."""
        return self.annotators is not None and self.training.row_weights is None

    @property
    def trusted_code(self) -> list[str]:
        """The settings that let code run which ships with a model."""
        engines = {"synthesis.engine": self.synthesis.engine, "evaluation.engine": self.evaluation.engine}
        if self.prompts.made and self.prompts.made.engine:
            engines["prompts.made.engine"] = self.prompts.made.engine
        for name, voice in self.synthesis.voices.items():
            engines |= {f"synthesis.voices.{name}.engine": voice.engine} if voice.engine else {}
        for reward in self.rewards:
            engines |= {f"rewards.{reward.name}.{field}": engine for field, engine in reward.engines.items()}
        trusting = [name for name, engine in engines.items() if engine.options.get("trust_remote_code")]
        return ["student"] * self.student.trust_remote_code + [f"{name}.options" for name in trusting]

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
        within = [reward.reward.name for reward in self.rewards if isinstance(reward, TargetReward)]
        if twice := next((name for name in within if [*names, *within].count(name) > 1), None):
            raise ValueError(f"rewards: the name {twice!r} of a target's reward is another one's too; give it its own")
        if self.synthesis.task and not self.rewards:
            raise ValueError("rewards: give at least one; only a ready preference data set can do without")
        if self.rewards and not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards: every weight is 0; give the optimised reward a weight above 0")
        if self.rounds.count > 1 and not self.rewards:
            raise ValueError("rounds: a round is judged by a reward; give at least one")
        if self.rounds.count > 1 and self.trains_adapter and not self.publish.merge:
            raise ValueError("rounds: the next round begins with the whole model; set publish.merge = true")
        if self.rounds.watch not in {"optimised", *names}:
            meant = did_you_mean(self.rounds.watch, ["optimised", *names])
            raise ValueError(
                f"rounds: watch = {self.rounds.watch!r} is no reward{meant}; there are {', '.join(names)}, optimised"
            )
        return self

    @model_validator(mode="after")
    def _check_annotators(self) -> Job:
        check_annotators(self)
        return self

    @model_validator(mode="after")
    def _check_suites(self) -> Job:
        names = [suite.named for suite in self.suites]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"suites: two suites have the name {twice!r}; give each its own `name`")
        return self

    @model_validator(mode="after")
    def _check_start(self) -> Job:
        if self.student.adapter is None:
            return self
        if self.synthesis.adapter and not self.synthesis.teacher:
            raise ValueError(
                "synthesis: adapter would lie on the student, which has one of its own; name the model that it is for "
                "as synthesis.teacher, or remove it: the teacher is the student with student.adapter"
            )
        for name, voice in self.synthesis.voices.items():
            if voice.adapter and not voice.model:
                raise ValueError(
                    f"synthesis.voices.{name}: adapter would lie on the student, which has one of its own; name the "
                    "model that it is for, or remove it"
                )
        if self.student.continues and self.training.extrapolation:
            raise ValueError(
                "training: extrapolation moves away from a start that has no adapter yet; set it to 0, or "
                'student.adapter_use = "merge"'
            )
        if not self.student.continues and self.training.lora and not self.publish.merge:
            raise ValueError(
                "publish: merge = false leaves an adapter for the model with student.adapter merged into it, which is "
                'not published; set it to true, or student.adapter_use = "continue"'
            )
        return self

    @model_validator(mode="after")
    def _check_reasoning(self) -> Job:
        if self.retention and self.synthesis.trains_on_reasoning:
            raise ValueError(
                "retention: its texts have no reasoning, and the student is trained to think before it answers; remove "
                '[retention], or set synthesis.reasoning = "strip"'
            )
        return self

    @model_validator(mode="after")
    def _check_selection(self) -> Job:
        if self.selection is None:
            return self
        if self.synthesis.task is None:
            raise ValueError("selection: it goes by samples of the student; give synthesis.task, whose turns draw them")
        if self.synthesis.reasoning != "off":
            raise ValueError('selection: answers are read without reasoning; set synthesis.reasoning to "off"')
        if self.selection.pairs and self.student.adapter:
            raise ValueError("selection: pairs needs a student that is whole; merge student.adapter into it")
        return self

    @model_validator(mode="after")
    def _check_made(self) -> Job:
        made = self.prompts.made
        if made is None:
            return self
        if self.synthesis.task is None:
            raise ValueError(
                "prompts: made writes prompts without answers; give synthesis.task, whose turns answer them"
            )
        if self.synthesis.endpoint and made.model is None:
            raise ValueError(
                "prompts: made is written by engines, and the teacher is a server; name the model that writes as "
                "prompts.made.model"
            )
        return self

    @model_validator(mode="after")
    def _check_speakers(self) -> Job:
        if self.evaluation.refine and not self.synthesis.task:
            raise ValueError("evaluation: refine speaks the turns of a task; give synthesis.task")
        if self.synthesis.voices and not self.synthesis.task:
            raise ValueError("synthesis: voices speak the turns of a task; give synthesis.task, or remove voices")
        if self.synthesis.endpoint and (self.synthesis.teacher or self.synthesis.adapter):
            raise ValueError("synthesis: endpoint names a teacher already; remove teacher and adapter, or endpoint")
        return self

    @model_validator(mode="after")
    def _check_lookup(self) -> Job:
        common, made = self.synthesis, self.prompts.made
        spoken = {"synthesis": (common.engine, common.sampling)}
        for name, voice in common.voices.items():
            spoken[f"synthesis.voices.{name}"] = voice.engine or common.engine, voice.sampling or common.sampling
        if made:
            spoken["prompts.made"] = made.engine or common.engine, made.sampling or common.sampling
        spoken["evaluation"] = self.evaluation.engine, self.evaluation.sampling
        for where, (engine, sampling) in spoken.items():
            if engine.prompt_lookup and sampling.min_p:
                raise ValueError(
                    f"{where}: vLLM does not draft with min_p; remove sampling.min_p, or set engine.prompt_lookup = "
                    "false"
                )
        for reward in self.rewards:
            for field, engine in reward.engines.items():
                if engine.prompt_lookup:
                    raise ValueError(
                        f"rewards: {reward.name}: {field}.prompt_lookup: a score repeats nothing; remove it"
                    )
        return self

    @model_validator(mode="after")
    def _check_for_pairs(self) -> Job:
        if self.training.token_weights and self.pairs.others:
            raise ValueError("training: token_weights compare the two answers of a pair; remove it, or pairs.others")
        if self.training.shuffle_rewards and self.pairs.others:
            raise ValueError("training: shuffle_rewards is for pairs; remove it, or pairs.others")
        if self.training.policy_weight != "none" and (self.pairs.others or self.training.token_weights):
            raise ValueError(
                "training: policy_weight weighs pairs whose tokens all count alike; remove it, or pairs.others and "
                "training.token_weights"
            )
        return self

    @model_validator(mode="after")
    def _check_relations(self) -> Job:
        if self.pairs.chosen == self.pairs.rejected:
            raise ValueError("pairs: chosen and rejected name the same turn; name two turns of the task")
        for section in ("reference", "training"):
            if getattr(self, section).tokens_per_batch < 2 * self.reference.max_length:
                raise ValueError(
                    f"{section}: tokens_per_batch must hold one pair, so at least twice "
                    f"reference.max_length = {2 * self.reference.max_length}"
                )
        if self.training.select == "best" and not self.pairs.heldout_fraction:
            raise ValueError('training: select = "best" goes by held-out pairs; give pairs.heldout_fraction above 0')
        if self.student.quantization != "none" and (self.training.lora is None or self.training.zero_stage == 3):
            raise ValueError(
                "student: quantization trains an adapter over weights that are not partitioned; "
                "give training.lora, and training.zero_stage 2 or lower"
            )
        if self.student.quantization != "none" and self.reference.shards > 1:
            raise ValueError("reference: weights in four bits cannot be partitioned; give shards = 1")
        if self.training.batch_size < largest(self.training.num_workers):
            raise ValueError(
                f"training: batch_size {self.training.batch_size} is below num_workers "
                f"{largest(self.training.num_workers)}; each worker needs at least one pair in a step"
            )
        return self
