"""How a forward's tokens are laid out: each prompt once with all its answers behind it, or padded rows.

Shapes: P prompts with K answers each are S = K * P sequences, all first answers, then all second
ones. Where prompts have further answers, of any number, those follow prompt by prompt. C is the number of completion
tokens of all sequences together that count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain
from typing import Any, TypedDict

import torch
from torch import Tensor

from rdpo.modeling.masking import counted_ids, read_ids

Tokens = Sequence[int]
"""Token ids; those of an answer that do not count are marked as in `rdpo.modeling.masking`."""


@dataclass(frozen=True)
class Span:
    """One prompt and its answers in a packed row: where it begins, and the lengths of its parts."""

    start: int
    prompt: int
    answers: tuple[int, ...]

    @property
    def end(self) -> int:
        """The first position behind it."""
        return self.start + self.prompt + sum(self.answers)

    def answer_starts(self) -> list[int]:
        """The position of each answer's first token."""
        return list(accumulate(self.answers[:-1], initial=self.start + self.prompt))


@dataclass(frozen=True, eq=False)
class PackedRow:
    """What stands where in a packed row, as it goes through a model to its attention.

    An object, since torch.compile looks into tuples, and would compile a layer anew for each number of spans.
    """

    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Batch:
    """S sequences as one forward reads them.

    Padded, `input_ids` and `attention_mask` are (S, T). Packed, `input_ids` and `position_ids` are
    (1, T) and `spans` says what stands where. Completion token c of all C that count has its hidden
    state at `predict_at[c]` of the flattened input, its id in `labels[c]`, and belongs to
    `sequence[c]`; `lengths` (S,) counts each sequence's. `weights` (C,) are what they weigh, where that is not 1.
    """

    input_ids: Tensor
    predict_at: Tensor
    labels: Tensor
    sequence: Tensor
    lengths: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    spans: tuple[Span, ...] = ()
    weights: Tensor | None = None

    def to(self, device: str | torch.device) -> Batch:
        """The batch on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def padded_batch(
    prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]], others: Sequence[Sequence[Tokens]] = ()
) -> Batch:
    """Right-padded rows, one for each sequence: the reference layout, which every architecture reads.

    Args:
        prompts: P lists of token ids, none empty.
        answers: K lists of P lists of token ids, none empty.
        others: further answers of each of the P prompts; nothing where none has any.
    """
    pairs: list[tuple[Tokens, Tokens]] = []
    for column in answers:
        pairs += zip(prompts, column, strict=True)
    for prompt, more in zip(prompts, others, strict=bool(others)):
        pairs += [(prompt, answer) for answer in more]
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)

    rows: list[list[int]] = []
    masks: list[list[int]] = []
    predicting: list[int] = []
    for number, (prompt, answer) in enumerate(pairs):
        length = len(prompt) + len(answer)
        rows.append([*prompt, *read_ids(answer), *[0] * (width - length)])
        masks.append([1] * length + [0] * (width - length))

        # The state at a position predicts the token after it: the prompt's last one predicts the answer's first.
        first = number * width + len(prompt) - 1
        predicting += _counting(range(first, first + len(answer)), answer)

    return Batch(
        input_ids=torch.tensor(rows),
        attention_mask=torch.tensor(masks),
        predict_at=torch.tensor(predicting),
        **_completions([answer for _, answer in pairs]),
    )


def packed_batch(
    prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]], others: Sequence[Sequence[Tokens]] = ()
) -> Batch:
    """One row without padding in which every prompt stands once: prompt | answer | answer | prompt | ...

    Args:
        prompts: P lists of token ids, none empty.
        answers: K lists of P lists of token ids, none empty.
        others: further answers of each of the P prompts; nothing where none has any.
    """
    further = others or [()] * len(prompts)
    groups = [(prompt, *own, *more) for prompt, *own, more in zip(prompts, *answers, further, strict=True)]
    spans: list[Span] = []
    for prompt, *own in groups:
        start = spans[-1].end if spans else 0
        spans.append(Span(start, len(prompt), tuple(map(len, own))))

    # In the order of the sequences: the first answers of all prompts, then the second ones.
    predicting: list[int] = []
    for number, column in enumerate(answers):
        for span, answer in zip(spans, column, strict=True):
            predicting += _counting(_predicting(span, number), answer)
    for span, more in zip(spans, further, strict=True):
        for number, answer in enumerate(more, start=len(answers)):
            predicting += _counting(_predicting(span, number), answer)

    tokens = read_ids([*chain.from_iterable(chain.from_iterable(groups))])
    positions = chain.from_iterable(map(_span_positions, spans))
    return Batch(
        input_ids=torch.tensor([tokens]),
        position_ids=torch.tensor([[*positions]]),
        predict_at=torch.tensor(predicting),
        spans=tuple(spans),
        **_completions([*chain.from_iterable(answers), *chain.from_iterable(further)]),
    )


def _predicting(span: Span, answer: int) -> list[int]:
    """Positions whose states predict an answer's tokens: the prompt's last, then all its own but the last."""
    start = span.answer_starts()[answer]
    return [span.start + span.prompt - 1, *range(start, start + span.answers[answer] - 1)]


def _counting(places: Sequence[int], answer: Tokens) -> list[int]:
    """Of the places that predict an answer's tokens, those of tokens that count."""
    return [place for place, token in zip(places, answer, strict=True) if token >= 0]


def _span_positions(span: Span) -> Iterator[int]:
    # Every answer counts on from its prompt, as if it stood alone behind it.
    yield from range(span.prompt)
    for length in span.answers:
        yield from range(span.prompt, span.prompt + length)


class _Completions(TypedDict):
    labels: Tensor
    lengths: Tensor
    sequence: Tensor


def _completions(answers: Sequence[Tokens]) -> _Completions:
    counted = [counted_ids(answer) for answer in answers]
    owners: list[int] = []
    for number, answer in enumerate(counted):
        owners += [number] * len(answer)

    return {
        "labels": torch.tensor([*chain.from_iterable(counted)]),
        "lengths": torch.tensor([len(answer) for answer in counted]),
        "sequence": torch.tensor(owners),
    }
