"""A reward model with a classification head, through transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING

import pyarrow as pa

from rdpo.cluster.hardware import compute_dtype, computed_dtype, take_device
from rdpo.cluster.pools import Held, Pool, engine_pool
from rdpo.config import TEMPLATE_DATE, ClassifierReward, Job
from rdpo.files.manifest import Settings
from rdpo.modeling.loading import check_loaded
from rdpo.modeling.reading import cap_settings
from rdpo.modeling.template import date_settings
from rdpo.modeling.weights import ModelRef, fingerprint
from rdpo.preference.rewards.classifier_input import Encoded, checked_classifier, last_token
from rdpo.preference.rewards.kind import RewardKind
from rdpo.preference.rewards.pooled import PooledClassifier
from rdpo.preference.scores import REASON_CHARS, Score, record_scores
from rdpo.records import Messages, drop, table_of
from rdpo.synthesis.crashes import open_crash_counts
from rdpo.synthesis.engine import engine_settings

if TYPE_CHECKING:
    import ray.data
    import torch

    from rdpo.preference.rewards.packed import PackedReader


class ClassifierKind(RewardKind[ClassifierReward]):
    """Actors that hold one model with a classification head, through transformers or on engines."""

    def check(self, job: Job) -> None:
        """Look at the model.

        Raises:
            InputError: it cannot be used as a reward.
        """
        for system in dict.fromkeys(one.system for one in job.prompts.each()):
            checked_classifier(self.reward, system, job.date)

    def settings(self, job: Job) -> Settings:
        """Its fields, and the model's weights."""
        reward, model = self.reward, ModelRef(self.reward.model)
        weights = fingerprint(*job.model_or_student(reward.model)[:2])
        found = {**reward.model_dump(exclude={"engine"}), "weights": weights, **date_settings(model, job.date)}
        if reward.engine:
            return {**found, "engine": engine_settings(reward.engine, model)}
        return {**found, **cap_settings(model), **computed_dtype(reward.dtype, reward.gpus)}

    def pools(self, job: Job) -> list[Pool]:
        """One pool."""
        return [self._pool(job)]

    def score(self, rows: ray.data.Dataset, job: Job, answers: list[str]) -> ray.data.Dataset:
        """Score by the model's output, or its outputs."""
        if self.reward.engine:
            arguments = {"reward": self.reward, "answers": answers, "job": job}
            return self._pool(job).map(rows, PooledClassifier, **arguments, crash_counts=open_crash_counts())
        return self._pool(job).map(rows, Classifier, reward=self.reward, answers=answers, day=job.date)

    def _pool(self, job: Job) -> Pool:
        reward, nodes = self.reward, job.cluster.placement.reward
        if reward.engine:
            return engine_pool("rewards", f"{self.where}.engine", reward.engine, nodes, ModelRef(reward.model))
        held = Held(ModelRef(reward.model), reward.dtype, tokens=reward.batch_size * reward.max_length)
        return Pool("rewards", self.where, reward.concurrency, 1, reward.gpus, nodes, holds=(held,))


class Classifier:
    """A Ray Data actor with a sequence-classification model.

    A score is that of the model called with one conversation and no padding, whatever stands beside it in the batch.
    Decoders that can read packed rows read what the answers to a prompt have in common once (see `packed`).
    """

    def __init__(self, reward: ClassifierReward, answers: list[str], day: date = TEMPLATE_DATE):
        import torch
        from transformers import AutoModelForSequenceClassification

        from rdpo.modeling.reading import read_padded
        from rdpo.preference.rewards.packed import open_packed

        self.reward, self.answers = reward, answers

        checked = checked_classifier(reward, day=day)
        self.input_ids, self.outputs = checked.conversations.input_ids, checked.outputs
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
        read_padded(self.model)

        self.by_token, self.pad_id = checked.scores_last, checked.pad_id
        packs = self.by_token and reward.layout != "padded"
        self.packed = open_packed(self.model, reward.batch_size * reward.max_length) if packs else None
        pad, rows = self.pad_id, model.get_input_embeddings().weight.shape[0]
        # Without a pad token of its own transformers' classes take one conversation; XLNet's reads the last place.
        self.in_batches = pad is not None and 0 <= pad < rows and not hasattr(model, "sequence_summary")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Score a block of rows; one that the chat template refuses is dropped."""
        rows = batch.to_pylist()
        encoded: list[list[Encoded | None]] = [[] for _ in rows]
        for answer in self.answers:
            for position, row in enumerate(rows):
                try:
                    encoded[position].append(self.input_ids(row["prompt"], row[answer]))
                except ValueError as error:
                    rows[position] = drop(row, f"reward {self.reward.name}: {error}"[:REASON_CHARS])
                    encoded[position].append(None)

        scores = self._scores_of_rows(encoded)
        for answer, column in zip(self.answers, zip(*scores, strict=True), strict=True):
            rows = record_scores(rows, answer, self.reward.name, column)
        return table_of(rows)

    def score(self, prompts: list[Messages], answers: list[str]) -> list[Score]:
        """Scores of answers, in order.

        Raises:
            ValueError: the chat template refuses a conversation.
        """
        encoded = [[self.input_ids(prompt, answer)] for prompt, answer in zip(prompts, answers, strict=True)]
        return [score for [score] in self._scores_of_rows(encoded)]

    def _scores_of_rows(self, encoded: Sequence[Sequence[Encoded | None]]) -> list[list[Score]]:
        """Scores of each row's answers, NaN of None."""
        if self.packed:
            return self._packed_scores(self.packed, encoded)
        sizes, flat = [len(row) for row in encoded], self._scores([*chain.from_iterable(encoded)])
        ends = [*accumulate(sizes, initial=0)]
        return [flat[start:end] for start, end in pairwise(ends)]

    def _packed_scores(self, read: PackedReader, encoded: Sequence[Sequence[Encoded | None]]) -> list[list[Score]]:
        """The same, each row's conversations with their common beginning once."""
        from rdpo.preference.rewards.packed import Group

        scores: list[list[Score]] = [[math.nan] * len(row) for row in encoded]
        groups: list[Group] = []
        places: list[list[tuple[int, int]]] = []
        for number, row in enumerate(encoded):
            there = {(number, place): one["input_ids"] for place, one in enumerate(row) if one is not None}
            if there:
                heads = [last_token(ids, self.pad_id) for ids in there.values()]
                groups.append(Group.of([*there.values()], heads))
                places.append([*there])

        found = chain.from_iterable(read(groups))
        for (number, place), values in zip(chain.from_iterable(places), found, strict=True):
            scores[number][place] = self.outputs.score(values)
        return scores

    def _scores(self, encoded: list[Encoded | None]) -> list[Score]:
        """Scores in order, NaN of None; the forward runs over batches of similar length."""
        whole = {place: ids for place, ids in enumerate(encoded) if ids is not None}
        order = sorted(whole, key=lambda place: len(whole[place]["input_ids"]))
        size = self.reward.batch_size if self.by_token or self.in_batches else 1
        scores: list[Score] = [math.nan] * len(encoded)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for place, values in zip(chosen, self._forward([whole[one] for one in chosen]), strict=True):
                scores[place] = self.outputs.score(values)
        return scores

    def _forward(self, encoded: list[Encoded]) -> list[list[float]]:
        """The model's outputs (B, outputs)."""
        import torch

        with torch.inference_mode():
            if self.by_token:
                return self._at_last_tokens(encoded)
            logits: list[list[float]] = self.model(**self._padded(encoded)).logits.float().tolist()
        return logits

    def _at_last_tokens(self, encoded: list[Encoded]) -> list[list[float]]:
        """Outputs of a model whose head stands on one token.

        transformers looks for that token by comparing ids with the pad token, and finds padding where the two
        differ, or an end-of-turn token taken for padding. Here it is looked for before anything is padded.
        """
        import torch

        base = getattr(self.model, self.model.base_model_prefix)
        hidden = base(**self._padded(encoded), use_cache=False).last_hidden_state
        places = torch.tensor([last_token(one["input_ids"], self.pad_id) for one in encoded], device=hidden.device)
        chosen = hidden[torch.arange(len(encoded), device=hidden.device), places]
        outputs: list[list[float]] = self.model.score(chosen).float().tolist()
        return outputs

    def _padded(self, encoded: list[Encoded]) -> dict[str, torch.Tensor]:
        """One tensor (B, T) for each input, filled up on the right; what is filled up is not attended to."""
        import torch

        longest = max(len(one["input_ids"]) for one in encoded)
        filler = {"input_ids": (self.pad_id or 0) if self.in_batches else 0}
        padded = {}
        for name in encoded[0]:
            rows = [one[name] + [filler.get(name, 0)] * (longest - len(one[name])) for one in encoded]
            padded[name] = torch.tensor(rows, device=self.device)
        return padded
