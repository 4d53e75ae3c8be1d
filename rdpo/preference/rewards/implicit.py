"""DPO's implicit reward: what a trained model has learnt to prefer, against the model it was trained from.

    r(x, y) = beta * [log pi(y|x) - log ref(y|x)]        (arXiv 2305.18290, Eq. 5, up to a constant of x)

The self-reward of DICE (arXiv 2406.09760). The log-probs come from the forward that training uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from rdpo.cluster.hardware import compute_dtype, computed_dtype
from rdpo.cluster.pools import Held, Pool
from rdpo.config import ImplicitReward, Job
from rdpo.errors import InputError
from rdpo.files.manifest import Settings
from rdpo.modeling.chat import Chat, chat_like_student, rendering_settings
from rdpo.modeling.readers import FrozenModel, answer_logps
from rdpo.modeling.start import check_adapter
from rdpo.modeling.student import checked_model
from rdpo.modeling.weights import ModelRef
from rdpo.preference.rewards.kind import RewardKind
from rdpo.preference.scores import record_scores
from rdpo.records import Row, table_of
from rdpo.training.backend import backend_of
from rdpo.training.sharded import open_readers

if TYPE_CHECKING:
    import ray.data

CHUNK = 1024
PROBE_TEXT = "Ein Satz, 3 numbers: 12, 345; naïve 日本 <|end|>"


class ImplicitKind(RewardKind[ImplicitReward]):
    """Actors that hold two models."""

    def check(self, job: Job) -> None:
        """Compare the models' tokenizers.

        Raises:
            InputError: they differ, or a model cannot be had.
        """
        checked_implicit(self.reward, job)

    def settings(self, job: Job) -> Settings:
        """Its fields, and the weights of both models."""
        trained, reference = trained_of(self.reward, job), reference_of(self.reward, job)
        precision = computed_dtype(self.reward.dtype, self.reward.gpus)
        weights = {"weights": trained.fingerprint(), "reference": reference.fingerprint()}
        # Both adapters are part of these weights.
        own = self.reward.model_dump(exclude={"reference_adapter"})
        return {**own, **weights, **precision, **rendering_settings(chat_like_student(job, trained))}

    def needs_trial(self, job: Job) -> bool:
        """Not where answers are read with their reasoning: the two plain pairs have none."""
        return not job.synthesis.trains_on_reasoning

    def pools(self, job: Job) -> list[Pool]:
        """One pool."""
        return [self._pool(job)]

    def score(self, rows: ray.data.Dataset, job: Job, answers: list[str]) -> ray.data.Dataset:
        """Score by the log-ratio of the two models."""
        return self._pool(job).map(rows, Implicit, reward=self.reward, answers=answers, job=job)

    def against(self, start: str, adapter: str | None = None) -> ImplicitReward:
        """The reward of the policy itself is measured against the model that it was trained from."""
        update = {"reference": start, "reference_adapter": adapter}
        return self.reward if self.reward.model else self.reward.model_copy(update=update)

    def _pool(self, job: Job) -> Pool:
        return implicit_pool(self.reward, job)


def implicit_pool(reward: ImplicitReward, job: Job) -> Pool:
    """The actors of an implicit reward, each of them one process or several."""
    models = (trained_of(reward, job), reference_of(reward, job))
    return Pool(
        "rewards",
        f"rewards.{reward.name}",
        reward.concurrency,
        1,
        reward.gpus,
        job.cluster.placement.reward,
        shards=reward.shards,
        holds=tuple(Held(model, reward.dtype, reward.tokens_per_batch, CHUNK) for model in models),
    )


class Implicit:
    """A Ray Data actor that holds the trained model and its reference."""

    def __init__(self, reward: ImplicitReward, answers: list[str], job: Job):
        self.reward, self.answers = reward, answers
        self.chat = checked_implicit(reward, job)
        models = [frozen_model(model, reward) for model in (trained_of(reward, job), reference_of(reward, job))]
        pool, backend = implicit_pool(reward, job), backend_of(job)
        self.trained, self.start = open_readers(models, pool, reward.tokens_per_batch, backend)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Score a block of rows."""
        rows = batch.to_pylist()
        for answer in self.answers:
            rows = record_scores(rows, answer, self.reward.name, self.score(rows, answer))
        return table_of(rows)

    def score(self, rows: list[Row], answer: str) -> list[float]:
        """Implicit rewards of one answer of each row; NaN where it has no tokens."""
        mean = self.reward.normalization == "token_mean"
        after, before = (answer_logps(rows, answer, self.chat, reader) for reader in (self.trained, self.start))
        ratios = [one - other for one, other in zip(after, before, strict=True)]
        return [self.reward.beta * ratio.nats / (max(ratio.tokens, 1) if mean else 1) for ratio in ratios]


def frozen_model(model: ModelRef, reward: ImplicitReward) -> FrozenModel:
    """One of the two models, in the reward's own precision and never quantised: neither is this run's reference."""
    from rdpo.modeling.model import ForwardSettings

    dtype = compute_dtype(reward.dtype, reward.gpus > 0)
    return FrozenModel(
        model, ForwardSettings(dtype, CHUNK, trust_remote_code=model.trust), f"rewards.{reward.name}: {model.name}"
    )


def trained_of(reward: ImplicitReward, job: Job) -> ModelRef:
    """The trained model: the reward's own, or the student."""
    return ModelRef.of(job, reward.model)


def reference_of(reward: ImplicitReward, job: Job) -> ModelRef:
    """The reference model: the reward's own, perhaps with an adapter, or the student."""
    found = ModelRef.of(job, reward.reference)
    return found._replace(adapter=reward.reference_adapter) if reward.reference_adapter else found


def checked_implicit(reward: ImplicitReward, job: Job) -> Chat:
    """The trained model's chat, after a look at whether both models read a probe as the same tokens.

    Raises:
        InputError: they do not.
    """
    trained, reference = trained_of(reward, job), reference_of(reward, job)
    chat, other = chat_like_student(job, trained), chat_like_student(job, reference)
    # Their log-probs are compared token by token, so both must read the same tokens.
    probe = [{"role": "user", "content": PROBE_TEXT}]
    if chat.prompt_ids(probe) != other.prompt_ids(probe):
        raise InputError(f"rewards.{reward.name}: {trained.name} and {reference.name} have different tokenizers")
    for model in {trained, reference}:
        outlined = checked_model(f"rewards.{reward.name}: {model.name}", model, chat)
        # The student's own is looked at with the student.
        if model == reference and reward.reference_adapter:
            check_adapter(f"rewards.{reward.name}: {reward.reference_adapter}", model, outlined)
    return chat
