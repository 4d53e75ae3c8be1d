"""A decoder with a classification head on packed rows: what conversations have in common is read once for all of them.

The answers to a prompt begin alike. A row without padding holds that beginning once, with the rest of each conversation
behind it as if it stood alone there (`rdpo.modeling.attention`). Whether a model's outputs are then those of the model
called with one conversation is tried when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rdpo.cluster.hardware import shared_memory
from rdpo.modeling import attention
from rdpo.modeling.layout import PackedRow, Span
from rdpo.modeling.probe import MACHINE, NOISES, in_short, plain_attention, probe_texts, short_windows, windows_of
from rdpo.modeling.reading import read_packed, read_padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rdpo.modeling.probe import Texts

ROW_TOKENS = 8192
"""Most tokens of a row, but for a group of conversations that is longer by itself."""
EXACT, ROUNDED = 1e-4, 2**-6
"""How far outputs may be from those of one conversation alone, as a share of the largest: in 32 bits, and at least in
16, where the last places depend on the kernels."""


@dataclass(frozen=True)
class Group:
    """Conversations that begin with the same tokens: these, what each has beyond them, and where its head stands."""

    shared: tuple[int, ...]
    own: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...]

    @classmethod
    def of(cls, conversations: Sequence[Sequence[int]], heads: Sequence[int]) -> Group:
        """A group of some conversations; a single one has its last token alone as its own."""
        # Each needs a token of its own.
        limit = min(map(len, conversations)) - 1
        columns = enumerate(islice(zip(*conversations, strict=False), limit))
        count = next((place for place, tokens in columns if len(set(tokens)) > 1), limit)
        own = tuple(tuple(ids[count:]) for ids in conversations)
        return cls(tuple(conversations[0][:count]), own, tuple(heads))

    @property
    def tokens(self) -> int:
        """Tokens that are read."""
        return len(self.shared) + sum(map(len, self.own))


@dataclass(frozen=True)
class Row:
    """Groups in one row: ids and positions (1, T), what stands where, and the places of the heads (N,)."""

    input_ids: Tensor
    position_ids: Tensor
    spans: tuple[Span, ...]
    heads: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group], device: torch.device | str) -> Row:
        """The groups, one after the other."""
        spans: list[Span] = []
        ids: list[int] = []
        positions: list[int] = []
        heads: list[int] = []
        for group in groups:
            span = Span(len(ids), len(group.shared), tuple(map(len, group.own)))
            spans.append(span)
            ids += chain(group.shared, *group.own)
            positions += range(span.prompt)
            for start, length, head in zip(span.answer_starts(), span.answers, group.heads, strict=True):
                positions += range(span.prompt, span.prompt + length)
                heads.append(span.start + head if head < span.prompt else start + head - span.prompt)
        tensors = [torch.tensor(values, device=device) for values in (ids, positions, heads)]
        return cls(tensors[0][None], tensors[1][None], tuple(spans), tensors[2])


def rows_of(groups: Sequence[Group], most: int = ROW_TOKENS) -> Iterator[list[int]]:
    """Numbers of the groups that go into each row: the longest first, as many as it has room for."""
    row: list[int] = []
    filled = 0
    for number in sorted(range(len(groups)), key=lambda number: -groups[number].tokens):
        if row and filled + groups[number].tokens > most:
            yield row
            row, filled = [], 0
        row.append(number)
        filled += groups[number].tokens
    if row:
        yield row


class PackedReader:
    """A model that reads packed rows of at most so many tokens."""

    def __init__(self, model: PreTrainedModel, most: int = ROW_TOKENS):
        self.model, self.most = model, min(most, ROW_TOKENS)

    def __call__(self, groups: Sequence[Group]) -> list[list[list[float]]]:
        """The outputs of each group's conversations, in order."""
        found: list[list[list[float]]] = [[] for _ in groups]
        for numbers in rows_of(groups, self.most):
            row = Row.of([groups[number] for number in numbers], self.model.device)
            with torch.inference_mode():
                outputs = iter(read_row(self.model, row).tolist())
            for number in numbers:
                found[number] = [*islice(outputs, len(groups[number].own))]
        return found


def open_packed(model: PreTrainedModel, most: int) -> PackedReader | None:
    """A reader of packed rows, where a model's outputs are exact there; it reads them from then on."""
    return None if packing_fault(model) else PackedReader(model, most)


def read_row(model: PreTrainedModel, row: Row) -> Tensor:
    """Outputs (N, outputs) in fp32 of the conversations of a row, in order; the model reads packed rows."""
    base = getattr(model, model.base_model_prefix)
    layout: dict[str, Any] = {"position_ids": row.position_ids, "row": PackedRow(row.spans)}
    hidden = base(input_ids=row.input_ids, use_cache=False, **layout).last_hidden_state
    outputs: Tensor = model.score(hidden[0, row.heads]).float()
    return outputs


def packing_fault(model: PreTrainedModel) -> str:
    """Why a model cannot read packed rows; empty if it can, and it reads them from then on.

    Args:
        model: one whose head stands on the last token, in evaluation mode on its device.
    """
    usual = model.config._attn_implementation
    why = _fault(model)
    if why:
        read_padded(model, usual)
    return why


def _fault(model: PreTrainedModel) -> str:
    if not attention.can_pack(model):
        return f"{type(model).__name__} does not hand them through to its attention"
    device = model.device
    if why := attention.card_fault(model.config, model.dtype, shared_memory(device)):
        return why
    texts = probe_texts(model)
    try:
        own = _alone(model, texts)
        within = _tolerance(model, texts, own)
        read_packed(model)
        difference = _distance(model, texts, own)
        if difference <= within and windows_of(model):
            # A window is seldom shorter than a probe.
            with short_windows(model):
                difference = _distance(model, texts, _alone(model, texts))
    except MACHINE:
        raise
    except Exception as error:
        # What an architecture makes of arguments that it does not know is up to it.
        return in_short(error)
    return "" if difference <= within else f"outputs differ by {difference:.2g} from those of one conversation alone"


def _tolerance(model: PreTrainedModel, texts: Texts, own: Tensor) -> float:
    largest = max(1.0, float(own.abs().max()))
    if model.dtype == torch.float32:
        return EXACT * largest
    noise = float((_alone(model, texts, plain=False) - own).abs().max())
    return max(ROUNDED * largest, NOISES * noise)


def _alone(model: PreTrainedModel, texts: Texts, plain: bool = True) -> Tensor:
    """Outputs (N, outputs) of the probe's conversations, each read alone."""
    base, found = getattr(model, model.base_model_prefix), []
    with torch.inference_mode(), plain_attention(model) if plain else nullcontext():
        for prompt, answer in texts.sequences():
            ids = torch.tensor([[*prompt, *answer]], device=model.device)
            hidden = base(input_ids=ids, use_cache=False).last_hidden_state
            found.append(model.score(hidden[:, -1]).float())
    return torch.cat(found)


def _distance(model: PreTrainedModel, texts: Texts, own: Tensor) -> float:
    """The largest difference of the probe's outputs in a packed row from `own`."""
    groups = []
    for prompt, *answers in zip(texts.prompts, *texts.answers, strict=True):
        whole = [[*prompt, *answer] for answer in answers]
        groups.append(Group.of(whole, [len(ids) - 1 for ids in whole]))
    with torch.inference_mode():
        packed = read_row(model, Row.of(groups, model.device))
    # In the order of the texts: the first answers of all prompts, then the second ones.
    count = len(texts.answers)
    order = [number * count + column for column in range(count) for number in range(len(texts.prompts))]
    return float((packed[order] - own).abs().max())
