"""Drafts from a conversation's own text, for turns that go over an earlier answer (prompt lookup decoding).

A revision repeats much of the answer that it corrects. Where its last tokens stand earlier in the conversation, vLLM
takes those that follow there for a draft, and one forward reads all of them at once: what the model would not have said
is thrown away (speculative decoding, arXiv 2211.17192), so greedy answers are the same, and sampled ones come from the
same distribution. Nothing is drafted before as many tokens as `MATCH` are repeated, so that text which copies nothing
costs nothing. What is drafted depends on the conversation alone: an answer still follows from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rdpo.config import Engine, Job
from rdpo.config.task import Turn

MATCH = 4
"""Tokens that must stand earlier in the conversation."""
DRAFT = 8
"""Tokens of a draft at most."""
OPTION = "speculative_config"
"""vLLM's argument."""


def lookup_arguments(engine: Engine) -> dict[str, Any]:
    """What vLLM is given for an engine that is to look its drafts up."""
    if not engine.prompt_lookup:
        return {}
    lengths = {"prompt_lookup_min": MATCH, "prompt_lookup_max": MATCH, "num_speculative_tokens": DRAFT}
    return {OPTION: {"method": "ngram", **lengths}}


def with_lookup(job: Job, turns: Sequence[Turn]) -> Job:
    """The job of a speaker of these turns, with `prompt_lookup` made definite.

    Where it is left open there are drafts if a turn goes on after another one. Not on GPUs: there vLLM plans the next
    forward while one runs, which it cannot do with such drafts.
    """
    engine = job.synthesis.engine
    if engine.prompt_lookup is None:
        engine = engine.model_copy(update={"prompt_lookup": _pays(job, turns) and not _obstacle(job)})
    return job.model_copy(update={"synthesis": job.synthesis.model_copy(update={"engine": engine})})


def why_without(job: Job, turns: Sequence[Turn]) -> str:
    """Why a speaker whose turns would be quicker with drafts has none; nothing, if it has them or they would not."""
    left_open = job.synthesis.engine.prompt_lookup is None
    return _obstacle(job) if left_open and _pays(job, turns) else ""


def _pays(job: Job, turns: Sequence[Turn]) -> bool:
    has_engine = job.synthesis.endpoint is None
    return has_engine and not job.synthesis.engine.gpus and any(turn.after for turn in turns)


def _obstacle(job: Job) -> str:
    if OPTION in job.synthesis.engine.options:
        return f"engine.options has a {OPTION} of its own"
    return "vLLM does not draft with sampling.min_p" if job.synthesis.sampling.min_p else ""
