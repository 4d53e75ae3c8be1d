"""A reward model with a classification head, through transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rdpo.cluster.hardware import compute_dtype, computed_dtype, take_device
from rdpo.cluster.pools import Held, Pool
from rdpo.config import TEMPLATE_DATE, ClassifierReward, Job
from rdpo.errors import InputError
from rdpo.files.manifest import Settings
from rdpo.modeling.loading import check_loaded, check_token_ids, outline, positions_of
from rdpo.modeling.template import date_settings
from rdpo.modeling.weights import CONFIG, ModelRef, fingerprint, load_tokenizer, local_model, model_config
from rdpo.preference.rewards.kind import RewardKind
from rdpo.preference.scores import record_scores
from rdpo.records import Messages, drop, table_of, text_of

if TYPE_CHECKING:
    import ray.data
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

REASON_CHARS = 300
LABELS = ("num_labels", "id2label")
Encoded = dict[str, list[int]]


class ClassifierKind(RewardKind[ClassifierReward]):
    """Actors that hold one model with a classification head."""

    def check(self, job: Job) -> None:
        """Look at the model.

        Raises:
            InputError: it cannot be used as a reward.
        """
        checked_classifier(self.reward, job.prompts.system, job.date)

    def settings(self, job: Job) -> Settings:
        """Its fields, and the model's weights."""
        weights = fingerprint(*job.model_or_student(self.reward.model)[:2])
        precision = computed_dtype(self.reward.dtype, self.reward.gpus)
        rendering = date_settings(ModelRef(self.reward.model), job.date)
        return {**self.reward.model_dump(), "weights": weights, **precision, **rendering}

    def pools(self, job: Job) -> list[Pool]:
        """One pool."""
        return [self._pool(job)]

    def score(self, rows: ray.data.Dataset, job: Job, answers: list[str]) -> ray.data.Dataset:
        """Score by the model's one output."""
        return self._pool(job).map(rows, Classifier, reward=self.reward, answers=answers, day=job.date)

    def _pool(self, job: Job) -> Pool:
        reward, nodes = self.reward, job.cluster.placement.reward
        held = Held(ModelRef(reward.model), reward.dtype, tokens=reward.batch_size * reward.max_length)
        return Pool("rewards", self.where, reward.concurrency, 1, reward.gpus, nodes, holds=(held,))


class Classifier:
    """A Ray Data actor with a sequence-classification model of one output.

    The conversation is rendered with the reward model's own chat template if it has one, else as
    the text pair (prompt, answer); `answer_only` gives it the answer alone. A score is that of the
    model called with one conversation and no padding, whatever stands beside it in the batch.
    """

    def __init__(self, reward: ClassifierReward, answers: list[str], day: date = TEMPLATE_DATE):
        import torch
        from transformers import AutoModelForSequenceClassification
        from transformers.modeling_layers import GenericForSequenceClassification

        self.reward, self.answers, self.day = reward, answers, day

        checked = checked_classifier(reward)
        self.tokenizer, self.max_length = checked.tokenizer, checked.max_length
        self.device = take_device(reward.gpus)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            checked.folder,
            config=checked.config,
            dtype=getattr(torch, compute_dtype(reward.dtype, reward.gpus > 0)),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        check_loaded(checked.where, model, info, other_head=True)
        self.model = model.eval().to(self.device)

        self.by_token = type(model).forward is GenericForSequenceClassification.forward
        pad, rows = model.config.get_text_config().pad_token_id, model.get_input_embeddings().weight.shape[0]
        self.pad_id = pad
        # Without a pad token of its own transformers' classes take one conversation; XLNet's reads the last place.
        self.in_batches = pad is not None and 0 <= pad < rows and not hasattr(model, "sequence_summary")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Score a block of rows; one that the chat template refuses is dropped."""
        rows = batch.to_pylist()
        for answer in self.answers:
            encoded: list[Encoded | None] = []
            for position, row in enumerate(rows):
                try:
                    encoded.append(self.input_ids(row["prompt"], row[answer]))
                except ValueError as error:
                    rows[position] = drop(row, f"reward {self.reward.name}: {error}"[:REASON_CHARS])
                    encoded.append(None)
            rows = record_scores(rows, answer, self.reward.name, self._scores(encoded))
        return table_of(rows)

    def score(self, prompts: list[Messages], answers: list[str]) -> list[float]:
        """Scores of answers, in order.

        Raises:
            ValueError: the chat template refuses a conversation.
        """
        return self._scores([self.input_ids(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])

    def _scores(self, encoded: list[Encoded | None]) -> list[float]:
        """Scores in order, NaN of None; the forward runs over batches of similar length."""
        whole = {place: ids for place, ids in enumerate(encoded) if ids is not None}
        order = sorted(whole, key=lambda place: len(whole[place]["input_ids"]))
        size = self.reward.batch_size if self.by_token or self.in_batches else 1
        scores = [math.nan] * len(encoded)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for place, score in zip(chosen, self._forward([whole[one] for one in chosen]), strict=True):
                scores[place] = score
        return scores

    def input_ids(self, prompt: Messages, answer: str) -> Encoded:
        """What the model reads of one answer: the last tokens of a conversation that is too long.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        limit: dict[str, Any] = {"truncation": True, "max_length": self.max_length}
        if self.reward.answer_only:
            return dict(self.tokenizer(answer, **limit))
        if self.tokenizer.chat_template:
            messages = [*prompt, {"role": "assistant", "content": answer}]
            return _rendered(self.tokenizer, messages, self.day, limit)
        return dict(self.tokenizer(text_of(prompt), answer, **limit))

    def _forward(self, encoded: list[Encoded]) -> list[float]:
        import torch

        with torch.inference_mode():
            if self.by_token:
                return self._at_last_tokens(encoded)
            logits: list[float] = self.model(**self._padded(encoded)).logits[:, 0].float().tolist()
        return logits

    def _at_last_tokens(self, encoded: list[Encoded]) -> list[float]:
        """Scores of a model whose head stands on one token.

        transformers looks for that token by comparing ids with the pad token, and finds padding where the two
        differ, or an end-of-turn token taken for padding. Here it is looked for before anything is padded.
        """
        import torch

        base = getattr(self.model, self.model.base_model_prefix)
        hidden = base(**self._padded(encoded), use_cache=False).last_hidden_state
        places = torch.tensor([self._place(one["input_ids"]) for one in encoded], device=hidden.device)
        chosen = hidden[torch.arange(len(encoded), device=hidden.device), places]
        scores: list[float] = self.model.score(chosen)[:, 0].float().tolist()
        return scores

    def _place(self, ids: list[int]) -> int:
        """The token that the model alone reads its score from: the last that is not its own pad token."""
        places = (place for place in reversed(range(len(ids))) if ids[place] != self.pad_id)
        return next(places, 0)

    def _padded(self, encoded: list[Encoded]) -> dict[str, torch.Tensor]:
        """One tensor (B, T) for each input, filled up on the right; what is filled up is not attended to."""
        import torch

        longest = max(len(one["input_ids"]) for one in encoded)
        filler = {"input_ids": self.pad_id if self.in_batches else 0}
        padded = {}
        for name in encoded[0]:
            rows = [one[name] + [filler.get(name, 0)] * (longest - len(one[name])) for one in encoded]
            padded[name] = torch.tensor(rows, device=self.device)
        return padded


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, day: date, limit: dict[str, Any]) -> Encoded:
    try:
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, strftime_now=day.strftime, **limit
        )
    except Exception as error:
        # A template may raise whatever its author chose.
        raise ValueError(f"chat template refuses the conversation: {error}") from None
    return {key: list(value) for key, value in encoded.items()}


@dataclass(frozen=True)
class CheckedClassifier:
    """A reward model that can be used: where it lies, its configuration and tokenizer, and how much it reads."""

    where: str
    folder: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    max_length: int


def checked_classifier(
    reward: ClassifierReward, system: str | None = None, day: date = TEMPLATE_DATE
) -> CheckedClassifier:
    """A reward model, after a look at its configuration, the names and shapes of its tensors, and its tokenizer.

    No weights are read. `system`: the system message that every prompt will have; `day`: today, for templates that ask.

    Raises:
        InputError: it has no classification head, more than one output, tensors that do not fit, token ids beyond its
            embedding, or a chat template that refuses every prompt.
    """
    from transformers import AutoModelForSequenceClassification

    folder, config = str(local_model(reward.model)), model_config(reward.model)
    where = f"rewards.{reward.name}: {reward.model}"
    if not any("SequenceClassification" in name for name in config.architectures or []):
        raise InputError(f"{where} has no classification head ({config.architectures}); use kind = 'judge'")
    model, info = outline(where, AutoModelForSequenceClassification, folder, config=config)
    if not _says_labels(folder) and _stored_outputs(info) == {1}:
        # transformers takes two outputs where a configuration says nothing; the weights know better.
        config.num_labels = 1
        model, info = outline(where, AutoModelForSequenceClassification, folder, config=config)
    if config.num_labels != 1 and not (info["missing_keys"] or info["mismatched_keys"]):
        raise InputError(f"{where} has {config.num_labels} outputs; a reward model has one")
    check_loaded(where, model, info, other_head=True)

    tokenizer = load_tokenizer(reward.model)
    # Of a conversation that is too long the answer stays: it is what is scored.
    tokenizer.truncation_side = "left"
    check_token_ids(where, model, tokenizer)
    if system and tokenizer.chat_template and not reward.answer_only:
        _check_system(where, tokenizer, system, day)
    most = min(reward.max_length, positions_of(model) or reward.max_length)
    return CheckedClassifier(where, folder, config, tokenizer, most)


def _says_labels(folder: str) -> bool:
    """Whether the configuration itself says how many outputs there are."""
    written = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    return any(name in written for name in LABELS)


def _stored_outputs(info: Mapping[str, Any]) -> set[int]:
    """Outputs of those stored tensors whose shape is another than the configuration's."""
    return {stored[0] for _, stored, _ in info["mismatched_keys"]}


def _check_system(where: str, tokenizer: PreTrainedTokenizerBase, system: str, day: date) -> None:
    turns = (("system", system), ("user", "x"), ("assistant", "x"))
    try:
        _rendered(tokenizer, [{"role": role, "content": content} for role, content in turns], day, {})
    except ValueError as error:
        raise InputError(f"{where}: its {error}; every prompt has the system message of prompts.system") from None
