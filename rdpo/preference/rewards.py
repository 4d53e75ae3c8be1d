"""Rewards: an external score for every answer, from one or several sources.

For each answer column NAME adds `NAME_scores` (each reward's score by name) and `NAME_score` (their
weighted sum, the one that is optimised). A reward is a classifier head through transformers, a
language model as judge, or a Python function; all implement `score`.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rdpo.config import ClassifierReward, FunctionReward, Job, JudgeReward, Reward, Sampling
from rdpo.errors import InputError
from rdpo.policy.chat import load_chat
from rdpo.policy.hardware import available_cores, compute_dtype
from rdpo.policy.models import local_model
from rdpo.records import Messages, Row, alive, draw_seed, drop, table_of, text_of
from rdpo.synthesis.engine import ContextError, Engine, engine_pool, gather_rows
from rdpo.synthesis.given import REWARD as GIVEN
from rdpo.synthesis.instructions import check_template, render

if TYPE_CHECKING:
    import ray.data

BLOCK_ROWS = 64


def score_answers(rows: ray.data.Dataset, job: Job, answers: list[str]) -> ray.data.Dataset:
    """Score the named answer columns by every reward of the job, then combine the scores.

    The rewards take their turn one after the other, so that a machine which holds only one of the
    models can run them all.
    """
    for reward in job.rewards:
        rows = _score_by(rows, job, reward, answers).materialize()
    weights = {reward.name: reward.weight for reward in job.rewards} or {GIVEN: 1.0}
    return rows.map_batches(combine_table, fn_kwargs={"weights": weights, "answers": answers}, batch_format="pyarrow")


def _score_by(rows: ray.data.Dataset, job: Job, reward: Reward, answers: list[str]) -> ray.data.Dataset:
    arguments: dict[str, Any] = {"reward": reward, "answers": answers}
    if isinstance(reward, JudgeReward):
        return engine_pool(rows, Judge, reward.engine, {**arguments, "job": job})
    blocks = rows.repartition(target_num_rows_per_block=BLOCK_ROWS)
    if isinstance(reward, FunctionReward):
        arguments["path"] = os.getcwd()
        return blocks.map_batches(score_by_function, fn_kwargs=arguments, batch_format="pyarrow")
    from ray.data import ActorPoolStrategy

    return blocks.map_batches(
        Classifier,
        fn_constructor_kwargs=arguments,
        batch_format="pyarrow",
        batch_size=BLOCK_ROWS,
        compute=ActorPoolStrategy(size=reward.concurrency),
        num_gpus=reward.gpus,
    )


def record_scores(rows: list[Row], answer: str, reward: str, scores: list[float]) -> list[Row]:
    """Rows with one reward's scores of one answer; a score that is no finite number drops the row."""
    recorded = []
    for row, score in zip(rows, scores, strict=True):
        if alive(row) and not math.isfinite(score):
            row = drop(row, f"reward {reward}: score of {answer} is not a finite number")
        row[f"{answer}_scores"] = {**(row.get(f"{answer}_scores") or {}), reward: score}
        recorded.append(row)
    return recorded


def combine_table(table: pa.Table, weights: dict[str, float], answers: list[str]) -> pa.Table:
    """Add `NAME_score`, the weighted sum of an answer's scores; 0 where nothing scored it."""
    rows = table.to_pylist()
    for row in rows:
        for answer in answers:
            scores = row.setdefault(f"{answer}_scores", None) or {}
            row[f"{answer}_score"] = sum(weight * scores.get(name, 0.0) for name, weight in weights.items() if weight)
    return table_of(rows)


class Classifier:
    """A Ray Data actor with a sequence-classification model of one output.

    The conversation is rendered with the reward model's own chat template if it has one, else as
    the text pair (prompt, answer); `answer_only` gives it the answer alone.
    """

    def __init__(self, reward: ClassifierReward, answers: list[str]):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.reward, self.answers = reward, answers
        folder = checked_classifier(reward)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.truncation_side, self.tokenizer.padding_side = "left", "right"
        self.device = "cuda" if reward.gpus else "cpu"
        if not reward.gpus:
            torch.set_num_threads(len(available_cores()))
        dtype = getattr(torch, compute_dtype(reward.dtype, reward.gpus > 0))
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, use_safetensors=True)
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
    from transformers import AutoConfig

    folder = str(local_model(reward.model))
    config = AutoConfig.from_pretrained(folder)
    where = f"rewards.{reward.name}: {reward.model}"
    if not any("SequenceClassification" in name for name in config.architectures or []):
        raise InputError(f"{where} has no classification head ({config.architectures}); use kind = 'judge'")
    if config.num_labels != 1:
        raise InputError(f"{where} has {config.num_labels} outputs; a reward model has one")
    return folder


class Judge:
    """A Ray Data actor with a vLLM engine whose model rates answers by a rubric.

    The score is the expected rating: the rating tokens' probabilities, made to sum to one, times
    their values (the number a rating stands for, else its position).
    """

    def __init__(self, reward: JudgeReward, answers: list[str], job: Job):
        self.reward, self.answers, self.job = reward, answers, job
        model = reward.model or job.student.model
        self.chat = load_chat(model)
        self.values = rating_values(self.chat, reward)
        self.engine = Engine(str(local_model(model)), reward.engine, job.seed)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Rate a block of rows."""
        rows = batch.to_pylist()
        for answer in self.answers:
            scores = await gather_rows([self.rate(row, answer) for row in rows])
            rows = record_scores(rows, answer, self.reward.name, scores)
        yield table_of(rows)

    async def rate(self, row: Row, answer: str) -> float:
        """Expected rating of one answer; NaN if the question does not fit the judge's context."""
        question = render(self.reward.rubric, {"prompt": text_of(row["prompt"]), "answer": row[answer]})
        prompt_ids = self.chat.prompt_ids([{"role": "user", "content": question}], self.reward.prefill)
        seed = draw_seed(self.job.seed, row["prompt_id"], f"{self.reward.name}:{answer}")
        ids = list(self.values)
        try:
            rated = await self.engine.generate(
                prompt_ids,
                Sampling(temperature=0.0, top_p=1.0, max_tokens=1),
                seed,
                (),
                logprobs=len(ids),
                logprob_token_ids=ids,
            )
        except ContextError:
            return math.nan
        return expected_rating(self.values, rated.logprobs or {})

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.shutdown()


def rating_values(chat: Any, reward: JudgeReward) -> dict[int, float]:
    """Value of each rating by its token id.

    Raises:
        InputError: a rating is not one token, or the rubric is no valid template.
    """
    where = f"rewards.{reward.name}"
    unknown = check_template(reward.rubric, where) - {"prompt", "answer"}
    if unknown:
        raise InputError(f"{where}.rubric uses {', '.join(sorted(unknown))}; it may use `prompt` and `answer`")
    values = {}
    for position, rating in enumerate(reward.ratings):
        ids = chat.text_ids(rating)
        if len(ids) != 1:
            raise InputError(f"{where}.ratings: {rating!r} is {len(ids)} tokens; a rating must be one")
        number = rating.strip().lstrip("-").isdigit()
        values[ids[0]] = float(rating) if number else float(position)
    return values


def expected_rating(values: dict[int, float], logprobs: dict[int, float]) -> float:
    """Mean of the ratings' values under their probabilities, made to sum to one."""
    present = {token: math.exp(logprobs[token]) for token in values if token in logprobs}
    total = sum(present.values())
    return sum(values[token] * p for token, p in present.items()) / total if total > 0 else math.nan


def load_function(name: str, path: str | None = None) -> Callable[..., float]:
    """The function `package.module:name`, imported from the working directory or the environment.

    Raises:
        InputError: it cannot be imported or is not callable.
    """
    path = path or os.getcwd()
    if path not in sys.path:
        sys.path.insert(0, path)
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"reward function {name}: {error} (looked in {path} too)") from None
    if not callable(function):
        raise InputError(f"reward function {name} is not callable")
    return function


def score_by_function(batch: pa.Table, reward: FunctionReward, answers: list[str], path: str) -> pa.Table:
    """Score a block of rows with a Python function; a row on which it fails is dropped."""
    function = load_function(reward.function, path)
    rows = batch.to_pylist()
    for answer in answers:
        for position, row in enumerate(rows):
            try:
                score = float(function(row["prompt"], row[answer], row))
            except Exception as error:
                rows[position] = row = drop(row, f"reward {reward.name}: {type(error).__name__}: {error}"[:300])
                score = math.nan
            rows[position] = record_scores([row], answer, reward.name, [score])[0]
    return table_of(rows)


def check_rewards(job: Job) -> None:
    """Find out before the long work whether every reward can be had.

    Raises:
        InputError: a model, rating, rubric or function is not usable.
    """
    for reward in job.rewards:
        if isinstance(reward, ClassifierReward):
            checked_classifier(reward)
        elif isinstance(reward, JudgeReward):
            rating_values(load_chat(reward.model or job.student.model), reward)
        else:
            load_function(reward.function)
