"""Arms of a comparison on the same held-out preference pairs: how often each prefers the side that should be chosen.

Every interval is at 95% and paired, over the prompts of the pairs and over seeds where there are several (see
`rdpo.evaluation.intervals`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from rdpo.evaluation.intervals import Estimate, Values, mean_interval, share_interval, with_interval
from rdpo.experiments.arms import estimate_columns, estimate_figures
from rdpo.tracking.tables import aligned
from rdpo.training.heldout import correct

SELECTED = "selected by these pairs (training.select), so that their figures are too high"

Margins = dict[tuple[str, int], dict[str, float]]
"""Margins of held-out pairs by id, for each arm and seed."""


@dataclass(frozen=True)
class HeldoutResult:
    """One arm on the pairs that all arms were measured on with all seeds; a tie counts as half right.

    `margin` is beta * Delta, which still tells arms apart where all of them prefer the right side everywhere.
    `selected`: the arm's weights are those of the step at which these same pairs were most likely.
    """

    arm: str
    pairs: int
    seeds: int
    accuracy: Estimate
    against: Estimate
    margin: Estimate
    margin_against: Estimate
    selected: bool = False


def heldout_results(
    margins: Margins,
    rivals: dict[str, str],
    prompts: Mapping[str, str] | None = None,
    selected: Collection[str] = (),
) -> list[HeldoutResult]:
    """Every arm's accuracy, and its difference from that of the arm it is held against.

    Args:
        margins: margins of the held-out pairs.
        rivals: what each arm is held against.
        prompts: which prompt a pair belongs to, by the pair's id; by default each has its own.
        selected: arms whose weights were selected by these pairs.
    """
    pairs = sorted(set.intersection(*map(set, margins.values()))) if margins else []
    if not pairs:
        return []

    arms = dict.fromkeys(arm for arm, _ in margins)
    tables = {arm: _margins(_runs_of(arm, margins), pairs) for arm in arms}
    right = {arm: correct(table) for arm, table in tables.items()}
    # Pairs of one prompt are alike, and count as one.
    groups = [(prompts or {}).get(pair, pair) for pair in pairs]

    return [
        HeldoutResult(
            arm=arm,
            pairs=len(pairs),
            seeds=len(tables[arm]),
            accuracy=share_interval(right[arm], groups),
            against=mean_interval(right[arm] - right[rivals[arm]], groups),
            margin=mean_interval(tables[arm], groups),
            margin_against=mean_interval(tables[arm] - tables[rivals[arm]], groups),
            selected=arm in selected,
        )
        for arm in arms
        if rivals[arm] in right
    ]


def _runs_of(arm: str, margins: Margins) -> list[dict[str, float]]:
    return [of_run for (name, _), of_run in margins.items() if name == arm]


def _margins(runs: list[dict[str, float]], pairs: list[str]) -> Values:
    """Margins (seeds, pairs)."""
    table = []
    for run in runs:
        table.append([run[pair] for pair in pairs])
    return np.array(table, dtype=float)


def table(results: list[HeldoutResult], baseline: str) -> list[str]:
    """The results as lines of text."""
    if not results:
        return []
    against = f"against {baseline}"
    cells = [["", "prefers chosen", against, "margin", against], *map(_cells, results)]
    title = f"held-out pairs, {results[0].pairs} pairs, {results[0].seeds} seeds; intervals 95%"
    lines = ["", title, *aligned(cells)]
    if chosen := [result.arm for result in results if result.selected]:
        lines.append(f"{SELECTED}: {', '.join(chosen)}")
    return lines


def _cells(result: HeldoutResult) -> list[str]:
    return [
        result.arm,
        with_interval(result.accuracy, ".3f"),
        with_interval(result.against, "+.3f"),
        with_interval(result.margin, ".2f"),
        with_interval(result.margin_against, "+.2f"),
    ]


def to_csv(results: list[HeldoutResult]) -> str:
    """The results as CSV, one line for each arm."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = ("accuracy", "against", "margin", "margin_against")
    writer.writerow(["arm", "pairs", "seeds", *estimate_columns(names), "selected_by_these_pairs"])
    for result in results:
        figures = estimate_figures([getattr(result, name) for name in names])
        writer.writerow([result.arm, result.pairs, result.seeds, *figures, result.selected])
    return buffer.getvalue()
