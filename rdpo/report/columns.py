"""Numbers of all pairs and of all evaluated prompts, without their texts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rdpo.evaluation.compare import MODELS
from rdpo.evaluation.intervals import Values
from rdpo.files.stage_folder import StageFolder
from rdpo.records import ID_COLUMN, SIDES


@dataclass(frozen=True)
class PairColumns:
    """The pairs of a run, (n,) each: scores by reward of both sides, of all pairs that were scored; reward gaps of
    those that were kept and of those that were dropped; characters of both sides of those that were kept.
    """

    chosen: dict[str, Values]
    rejected: dict[str, Values]
    kept_gaps: Values
    dropped_gaps: Values
    chosen_chars: Values
    rejected_chars: Values

    def same_side(self) -> dict[tuple[str, str], float]:
        """For any two rewards the share of pairs on which they prefer the same side; undecided ones count half.

        Of pairs that both scored; NaN where there are none.
        """
        sides = {name: np.sign(self.chosen[name] - self.rejected[name]) for name in self.chosen}
        agreed = {(one, other): (1 + sides[one] * sides[other]) / 2 for one, other in product(sides, repeat=2)}
        # Not every row has the data set's own scores.
        known = {names: shares[np.isfinite(shares)] for names, shares in agreed.items()}
        return {names: float(shares.mean()) if len(shares) else float("nan") for names, shares in known.items()}

    @property
    def chosen_longer(self) -> float:
        """Share of the kept pairs whose chosen side is the longer one; equal lengths count half."""
        return _share_above(self.chosen_chars, self.rejected_chars)

    @property
    def gap_follows_length(self) -> float | None:
        """Rank correlation of the reward gap with how much longer the chosen side is."""
        return rank_correlation(self.kept_gaps, self.chosen_chars - self.rejected_chars)


@dataclass(frozen=True)
class PromptColumns:
    """The evaluated prompts of a run, (n,) each: scores by reward, the weighted score and tokens, of both models."""

    ids: list[str]
    scores: dict[str, dict[str, Values]]
    score: dict[str, Values]
    tokens: dict[str, Values]

    @property
    def rewards(self) -> list[str]:
        """Names of the rewards that scored the answers."""
        return list(self.scores["start"])

    @property
    def gain(self) -> Values:
        """How much the weighted score rose."""
        return self.score["trained"] - self.score["start"]

    @property
    def growth(self) -> Values:
        """How many tokens longer the trained model's answer is."""
        return self.tokens["trained"] - self.tokens["start"]

    def change(self, reward: str) -> Values:
        """How much one reward's score rose."""
        return self.scores["trained"][reward] - self.scores["start"][reward]

    def scored(self, reward: str) -> NDArray[np.bool_]:
        """Whether a reward scored both answers: not every prompt has as many criteria."""
        return np.isfinite(self.change(reward))

    def by_length(self, reward: str) -> LengthSplit:
        """A reward's win rate apart for answers that grew and those that did not, of those that it scored."""
        scored = self.scored(reward)
        growth = self.growth[scored]
        longer = growth > 0
        start, trained = (self.scores[model][reward][scored] for model in MODELS)
        grown, others = (_share_above(trained[where], start[where]) for where in (longer, ~longer))
        correlation = rank_correlation(trained - start, growth)
        return LengthSplit(int(longer.sum()), grown, int((~longer).sum()), others, correlation)


@dataclass(frozen=True)
class LengthSplit:
    """Win rates among the answers that became longer and among the others (NaN where there are none), and the rank
    correlation of gain and growth.
    """

    longer: int
    longer_wins: float
    others: int
    others_wins: float
    correlation: float | None


def pair_columns(folder: StageFolder) -> PairColumns:
    """The numbers of a pairs stage."""
    numbers = ["chosen_scores", "rejected_scores", "reward_gap"]
    kept, dropped = folder.table(columns=[*numbers, *SIDES]), folder.table("dropped", numbers)
    # A part in which all rows were dropped early has no scores, or columns of nulls.
    scored = pa.concat_tables([kept.select(numbers) if kept.num_rows else kept, dropped], promote_options="permissive")
    return PairColumns(
        chosen=_by_name(scored, "chosen_scores"),
        rejected=_by_name(scored, "rejected_scores"),
        kept_gaps=_numbers(kept, "reward_gap"),
        dropped_gaps=_numbers(dropped, "reward_gap"),
        chosen_chars=_chars(kept, "chosen"),
        rejected_chars=_chars(kept, "rejected"),
    )


def prompt_columns(folder: StageFolder) -> PromptColumns:
    """The numbers of an evaluation stage, in the order of the ids."""
    names = [f"{model}_{what}" for model, what in product(MODELS, ("scores", "score", "tokens"))]
    table = folder.table(columns=[ID_COLUMN, *names])
    table = table.sort_by(ID_COLUMN) if table.num_rows else table
    return PromptColumns(
        table[ID_COLUMN].to_pylist() if table.num_rows else [],
        {model: _by_name(table, f"{model}_scores") for model in MODELS},
        {model: _numbers(table, f"{model}_score") for model in MODELS},
        {model: _numbers(table, f"{model}_tokens") for model in MODELS},
    )


def prompt_lengths(folder: StageFolder) -> Values:
    """Tokens of all kept prompts (n,)."""
    return _numbers(folder.table(columns=["prompt_length"]), "prompt_length")


def rank_correlation(first: Values, second: Values) -> float | None:
    """Spearman's rank correlation of values (n,); None where one side is constant, or there are fewer than three."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Values) -> Values:
    """Ranks (n,); equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _share_above(first: Values, second: Values) -> float:
    """Share of places where the first is above the second, ties half; NaN of none."""
    return float(((1 + np.sign(first - second)) / 2).mean()) if len(first) else float("nan")


def _numbers(table: pa.Table, column: str) -> Values:
    """A column (n,) without its nulls."""
    return table[column].drop_null().to_numpy().astype(float) if table.num_rows else np.zeros(0)


def _by_name(table: pa.Table, column: str) -> dict[str, Values]:
    """Scores (n,) by reward of those rows that have any."""
    if not table.num_rows or not pa.types.is_struct(table[column].type):
        return {}
    scores = table[column].drop_null()
    return {field.name: pc.struct_field(scores, field.name).to_numpy() for field in scores.type}


def _chars(table: pa.Table, side: str) -> Values:
    """Characters (n,) of the answers of one side."""
    if not table.num_rows:
        return np.zeros(0)
    answers = pc.struct_field(pc.list_element(table[side], 0), "content")
    lengths: NDArray[np.float64] = pc.utf8_length(answers).to_numpy().astype(float)
    return lengths
