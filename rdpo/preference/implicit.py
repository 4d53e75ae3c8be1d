"""DPO's implicit reward: what a trained model has learnt to prefer, against the model it was trained from.

    r(x, y) = beta * [log pi(y|x) - log ref(y|x)]        (arXiv 2305.18290, Eq. 5, up to a constant of x)

The self-reward of DICE (arXiv 2406.09760). The log-probs come from the forward that training uses.
"""

from __future__ import annotations

import math

import pyarrow as pa

from rdpo.config import ImplicitReward, Job
from rdpo.errors import InputError
from rdpo.policy.chat import Chat, load_chat
from rdpo.policy.hardware import available_cores, compute_dtype
from rdpo.policy.models import local_model
from rdpo.policy.packing import PairSize, micro_batches
from rdpo.preference.scores import record_scores
from rdpo.records import Row, table_of

CHUNK = 1024
PROBE = "Ein Satz, 3 numbers: 12, 345; naïve 日本 <|end|>"


class Implicit:
    """A Ray Data actor that holds the trained model and its reference."""

    def __init__(self, reward: ImplicitReward, answers: list[str], job: Job):
        import torch

        from rdpo.policy.model import load_policy

        self.reward, self.answers = reward, answers
        self.chat = checked_implicit(reward, job)
        self.device = "cuda" if reward.gpus else "cpu"
        if not reward.gpus:
            torch.set_num_threads(len(available_cores()))
        dtype = compute_dtype(reward.dtype, reward.gpus > 0)
        self.policies = [
            load_policy(local_model(name, revision), dtype, CHUNK, trust_remote_code=trust).eval().to(self.device)
            for name, revision, trust in ((reward.model, None, False), reference_of(reward, job))
        ]

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Score a block of rows."""
        rows = batch.to_pylist()
        for answer in self.answers:
            rows = record_scores(rows, answer, self.reward.name, self.score(rows, answer))
        return table_of(rows)

    def score(self, rows: list[Row], answer: str) -> list[float]:
        """Implicit rewards of one answer of each row; NaN where it has no tokens."""
        prompts = [self._prompt_ids(row) for row in rows]
        answers = [self.chat.completion_ids(row[answer], row[f"{answer}_finish_reason"] == "stop") for row in rows]
        sizes = [PairSize(len(prompt), len(ids), 0) for prompt, ids in zip(prompts, answers, strict=True)]
        scores = [math.nan] * len(rows)
        whole = [index for index, ids in enumerate(answers) if ids and prompts[index]]
        for micro in micro_batches(whole, sizes, self.reward.tokens_per_batch, self.policies[0].packed):
            own = [[column[index] for index in micro.pairs] for column in (prompts, answers)]
            for index, ratio in zip(micro.pairs, self._log_ratios(*own), strict=True):
                length = len(answers[index]) if self.reward.normalization == "token_mean" else 1
                scores[index] = self.reward.beta * ratio / length
        return scores

    def _prompt_ids(self, row: Row) -> list[int]:
        """Ids of the prompt; none if the template refuses it."""
        try:
            return self.chat.prompt_ids(row["prompt"])
        except ValueError:
            return []

    def _log_ratios(self, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
        import torch

        with torch.inference_mode():
            trained, start = (policy(policy.batch(prompts, answers).to(self.device)) for policy in self.policies)
        return (trained - start).tolist()


def reference_of(reward: ImplicitReward, job: Job) -> tuple[str, str | None, bool]:
    """Name, revision and trust of the reference model: the reward's own, or the student."""
    if reward.reference:
        return reward.reference, None, False
    return job.student.model, job.student.revision, job.student.trust_remote_code


def checked_implicit(reward: ImplicitReward, job: Job) -> Chat:
    """The trained model's chat, after a look at whether both models read a probe as the same tokens.

    Raises:
        InputError: they do not.
    """
    reference = reference_of(reward, job)
    chat, other = load_chat(reward.model), load_chat(*reference)
    probe = [{"role": "user", "content": PROBE}]
    if chat.prompt_ids(probe) != other.prompt_ids(probe):
        raise InputError(f"rewards.{reward.name}: {reward.model} and {reference[0]} have different tokenizers")
    return chat
