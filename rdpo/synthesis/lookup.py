"""Drafts from a conversation's own text, for turns that go over an earlier answer (prompt lookup decoding).

A revision repeats much of the answer that it corrects. Where its last tokens stand earlier in the conversation, vLLM
takes those that follow there for a draft, and one forward reads all of them at once: what the model would not have said
is thrown away (speculative decoding, arXiv 2211.17192), so greedy answers are the same, and sampled ones come from the
same distribution. Nothing is drafted before as many tokens as `MATCH` are repeated, so that text which copies nothing
costs little. What is drafted depends on the conversation alone: an answer still follows from its seed.

A job asks for it (`engine.prompt_lookup`). A run that has none says after its synthesis where it would have paid, by
what its answers repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice, takewhile
from typing import Any

from rdpo.config import Engine, Job
from rdpo.config.task import Task
from rdpo.records import Row, text_of

MATCH = 4
"""Tokens that must stand earlier in the conversation; words, where only the text is looked at."""
DRAFT = 8
"""Tokens of a draft at most."""
WORTH = 0.4
"""Share of words that must be repeated for drafts to be proposed."""
LOOKED_AT = 200
"""Rows whose answers are looked at; they are alike."""


def lookup_arguments(engine: Engine) -> dict[str, Any]:
    """What vLLM is given for an engine that is to look its drafts up."""
    if not engine.prompt_lookup:
        return {}
    lengths = {"prompt_lookup_min": MATCH, "prompt_lookup_max": MATCH, "num_speculative_tokens": DRAFT}
    return {"speculative_config": {"method": "ngram", **lengths}}


def repeated(answer: str, before: str) -> tuple[int, int]:
    """How many words of an answer drafts from the text before it and from itself would have written, and of how many.

    A draft is taken from behind the last place where the `MATCH` words before it stand, as far as it is right.
    """
    words, known = answer.split(), before.split()
    places = {tuple(known[place - MATCH : place]): place for place in range(MATCH, len(known))}
    text = [*known, *words]
    drafted, place = 0, len(known)
    while place < len(text):
        start = places.get(tuple(text[max(0, place - MATCH) : place]))
        draft = text[start : start + DRAFT] if start is not None else []
        beside = zip(draft, text[place : place + DRAFT], strict=False)
        right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], beside))
        drafted += right
        for passed in range(place, place + max(1, right)):
            places[tuple(text[max(0, passed - MATCH) : passed])] = passed
        place += max(1, right)
    return drafted, len(words)


def repeated_shares(rows: Iterable[Row], task: Task) -> dict[str, float]:
    """Of each turn that goes on after another one, the share of its words that drafts would have written."""
    turns = [turn for turn in task.turns if turn.after]
    counts = {turn.name: [0, 0] for turn in turns}
    for row in islice(rows, LOOKED_AT):
        for turn in turns:
            earlier = task.turns[: task.turns.index(turn)]
            before = [text_of(row["prompt"]), *(row.get(name) or "" for one in earlier for name in one.names)]
            for name in turn.names:
                found = repeated(row.get(name) or "", "\n".join(before))
                counts[turn.name] = [one + more for one, more in zip(counts[turn.name], found, strict=True)]
    return {name: drafted / words for name, (drafted, words) in counts.items() if words}


def proposals(job: Job, shares: dict[str, float]) -> Iterator[str]:
    """What a person may be told of drafts that the engines of a job's teacher did not have."""
    engine = job.synthesis.engine
    if engine.prompt_lookup or job.synthesis.endpoint:
        return
    for name, share in shares.items():
        if share >= WORTH:
            yield f"{name} repeats {share:.0%} of its words; engine.prompt_lookup = true has them drafted"
