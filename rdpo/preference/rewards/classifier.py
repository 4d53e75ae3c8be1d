"""A reward model with a classification head, through transformers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rdpo.cluster.hardware import compute_dtype, take_device
from rdpo.cluster.pools import Pool
from rdpo.config import ClassifierReward, Job
from rdpo.errors import InputError
from rdpo.modeling.weights import fingerprint, load_tokenizer, local_model, model_config
from rdpo.preference.rewards.kind import RewardKind
from rdpo.preference.scores import record_scores
from rdpo.records import Messages, table_of, text_of

if TYPE_CHECKING:
    import ray.data


class ClassifierKind(RewardKind[ClassifierReward]):
    """Actors that hold one model with a classification head."""

    def check(self, job: Job) -> None:
        """Look at the model.

        Raises:
            InputError: it cannot be used as a reward.
        """
        checked_classifier(self.reward)

    def settings(self, job: Job) -> dict[str, Any]:
        """Its fields, and the model's weights."""
        return {**self.reward.model_dump(), "weights": fingerprint(*job.model_or_student(self.reward.model)[:2])}

    def pools(self, job: Job) -> list[Pool]:
        """One pool."""
        return [self._pool(job)]

    def score(self, rows: ray.data.Dataset, job: Job, answers: list[str]) -> ray.data.Dataset:
        """Score by the model's one output."""
        return self._pool(job).map(rows, Classifier, reward=self.reward, answers=answers)

    def _pool(self, job: Job) -> Pool:
        nodes = job.cluster.placement.reward
        return Pool("rewards", self.where, self.reward.concurrency, 1, self.reward.gpus, nodes)


class Classifier:
    """A Ray Data actor with a sequence-classification model of one output.

    The conversation is rendered with the reward model's own chat template if it has one, else as
    the text pair (prompt, answer); `answer_only` gives it the answer alone.
    """

    def __init__(self, reward: ClassifierReward, answers: list[str]):
        import torch
        from transformers import AutoModelForSequenceClassification

        self.reward, self.answers = reward, answers
        folder = checked_classifier(reward)
        self.tokenizer = load_tokenizer(reward.model)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.truncation_side, self.tokenizer.padding_side = "left", "right"
        self.device = take_device(reward.gpus)
        dtype = getattr(torch, compute_dtype(reward.dtype, reward.gpus > 0))
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.eval().to(self.device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Score a block of rows."""
        rows = batch.to_pylist()
        for answer in self.answers:
            scores = self.score([row["prompt"] for row in rows], [row[answer] for row in rows])
            rows = record_scores(rows, answer, self.reward.name, scores)
        return table_of(rows)

    def score(self, prompts: list[Messages], answers: list[str]) -> list[float]:
        """Scores of answers, in order; the forward runs over batches of similar length."""
        ids = [self.input_ids(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]["input_ids"]))
        scores = [math.nan] * len(ids)
        for start in range(0, len(order), self.reward.batch_size):
            chosen = order[start : start + self.reward.batch_size]
            for index, score in zip(chosen, self._forward([ids[i] for i in chosen]), strict=True):
                scores[index] = score
        return scores

    def input_ids(self, prompt: Messages, answer: str) -> dict[str, list[int]]:
        """What the model reads of one answer."""
        limit: dict[str, Any] = {"truncation": True, "max_length": self.reward.max_length}
        if self.reward.answer_only:
            return dict(self.tokenizer(answer, **limit))
        if self.tokenizer.chat_template:
            messages = [*prompt, {"role": "assistant", "content": answer}]
            encoded = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **limit)
            return {key: list(value) for key, value in encoded.items()}
        return dict(self.tokenizer(text_of(prompt), answer, **limit))

    def _forward(self, encoded: list[dict[str, list[int]]]) -> list[float]:
        import torch

        padded = self.tokenizer.pad(encoded, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            return self.model(**padded).logits[:, 0].float().tolist()


def checked_classifier(reward: ClassifierReward) -> str:
    """Folder of a reward model, after a look at its configuration.

    Raises:
        InputError: it has no classification head, or more than one output.
    """
    folder, config = str(local_model(reward.model)), model_config(reward.model)
    where = f"rewards.{reward.name}: {reward.model}"
    if not any("SequenceClassification" in name for name in config.architectures or []):
        raise InputError(f"{where} has no classification head ({config.architectures}); use kind = 'judge'")
    if config.num_labels != 1:
        raise InputError(f"{where} has {config.num_labels} outputs; a reward model has one")
    return folder
