"""How a forward's tokens are laid out: each prompt once with all its answers behind it, or padded rows.

Shapes: P prompts with K answers each are S = K * P sequences, all first answers, then all second
ones. C is the number of completion tokens of all sequences together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Tokens = Sequence[int]


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


@dataclass(frozen=True)
class Batch:
    """S sequences as one forward reads them.

    Padded, `input_ids` and `attention_mask` are (S, T). Packed, `input_ids` and `position_ids` are
    (1, T) and `spans` says what stands where. Completion token c of all C has its hidden state at
    `predict_at[c]` of the flattened input, its id in `labels[c]`, and belongs to `sequence[c]`;
    `lengths` (S,) counts each sequence's completion tokens.
    """

    input_ids: Tensor
    predict_at: Tensor
    labels: Tensor
    sequence: Tensor
    lengths: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    spans: tuple[Span, ...] = ()

    def to(self, device: str | torch.device) -> Batch:
        """The batch on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def padded_batch(prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]]) -> Batch:
    """Right-padded rows, one for each sequence: the reference layout, which every architecture reads.

    Args:
        prompts: P lists of token ids, none empty.
        answers: K lists of P lists of token ids, none empty.
    """
    pairs = [(prompt, answer) for column in answers for prompt, answer in zip(prompts, column, strict=True)]
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    rows = [[*prompt, *answer] for prompt, answer in pairs]
    return Batch(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        predict_at=_positions(
            [
                range(index * width + len(prompt) - 1, index * width + len(prompt) - 1 + len(answer))
                for index, (prompt, answer) in enumerate(pairs)
            ]
        ),
        **_completions([answer for _, answer in pairs]),
    )


def packed_batch(prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]]) -> Batch:
    """One row without padding in which every prompt stands once: prompt | answer | answer | prompt | ...

    Args:
        prompts: P lists of token ids, none empty.
        answers: K lists of P lists of token ids, none empty.
    """
    groups = list(zip(prompts, *answers, strict=True))
    starts = accumulate((sum(map(len, group)) for group in groups[:-1]), initial=0)
    spans = tuple(
        Span(start, len(prompt), tuple(map(len, own))) for start, (prompt, *own) in zip(starts, groups, strict=True)
    )
    predicting = [_predicting(span, answer) for answer in range(len(answers)) for span in spans]
    return Batch(
        input_ids=torch.tensor([[token for group in groups for part in group for token in part]]),
        position_ids=torch.tensor([[position for span in spans for position in _span_positions(span)]]),
        predict_at=_positions(predicting),
        spans=spans,
        **_completions([answer for column in answers for answer in column]),
    )


def _predicting(span: Span, answer: int) -> list[int]:
    """Positions whose states predict an answer's tokens: the prompt's last, then all its own but the last."""
    start = span.answer_starts()[answer]
    return [span.start + span.prompt - 1, *range(start, start + span.answers[answer] - 1)]


def _span_positions(span: Span) -> Iterator[int]:
    yield from range(span.prompt)
    for length in span.answers:
        yield from range(span.prompt, span.prompt + length)


def _positions(parts: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([position for part in parts for position in part])


def _completions(answers: Sequence[Tokens]) -> dict[str, Any]:
    return {
        "labels": torch.tensor([token for answer in answers for token in answer]),
        "lengths": torch.tensor([len(answer) for answer in answers]),
        "sequence": torch.tensor([index for index, answer in enumerate(answers) for _ in answer]),
    }
