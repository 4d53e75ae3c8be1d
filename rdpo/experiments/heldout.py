"""Arms of a comparison on the same held-out preference pairs: how often each prefers the side that should be chosen.

A pair's figure is its mean over the seeds; every interval is a 95% percentile interval of a paired bootstrap over
pairs.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

import numpy as np

from rdpo.evaluation.compare import Estimate, Values, bootstrap, with_interval
from rdpo.experiments.arms import BOOTSTRAP_SEED
from rdpo.training.heldout import correct

Margins = dict[tuple[str, int], dict[str, float]]
"""Margins of held-out pairs by id, for each arm and seed."""


@dataclass(frozen=True)
class HeldoutResult:
    """One arm on the pairs that all arms were measured on with all seeds; a tie counts as half right.

    `margin` is beta * Delta, which still tells arms apart where all of them prefer the right side everywhere.
    """

    arm: str
    pairs: int
    seeds: int
    accuracy: Estimate
    against: Estimate
    margin: Estimate
    margin_against: Estimate


def heldout_results(margins: Margins, rivals: dict[str, str]) -> list[HeldoutResult]:
    """Every arm's accuracy, and its difference from that of the arm it is held against (`rivals`)."""
    pairs = sorted(set.intersection(*(set(of_run) for of_run in margins.values()))) if margins else []
    if not pairs:
        return []
    arms = dict.fromkeys(arm for arm, _ in margins)
    tables = {arm: _margins([margins[run] for run in margins if run[0] == arm], pairs) for arm in arms}
    right = {arm: correct(table).mean(axis=0) for arm, table in tables.items()}
    wide = {arm: table.mean(axis=0) for arm, table in tables.items()}
    return [
        HeldoutResult(
            arm=arm,
            pairs=len(pairs),
            seeds=len(tables[arm]),
            accuracy=bootstrap(right[arm], BOOTSTRAP_SEED),
            against=bootstrap(right[arm] - right[rivals[arm]], BOOTSTRAP_SEED),
            margin=bootstrap(wide[arm], BOOTSTRAP_SEED),
            margin_against=bootstrap(wide[arm] - wide[rivals[arm]], BOOTSTRAP_SEED),
        )
        for arm in arms
        if rivals[arm] in right
    ]


def _margins(runs: list[dict[str, float]], pairs: list[str]) -> Values:
    """Margins (seeds, pairs)."""
    return np.array([[run[pair] for pair in pairs] for run in runs], dtype=float)


def table(results: list[HeldoutResult], baseline: str) -> list[str]:
    """The results as lines of text."""
    if not results:
        return []
    width = max(len(result.arm) for result in results) + 2
    against = f"against {baseline}"
    title = f"held-out pairs, {results[0].pairs} pairs, {results[0].seeds} seeds; intervals 95%"
    lines = ["", title, f"{'':<{width}}{'prefers chosen':<23}{against:<26}{'margin':<22}{against}"]
    for result in results:
        accuracy, better = with_interval(result.accuracy, ".3f"), with_interval(result.against, "+.3f")
        margin, wider = with_interval(result.margin, ".2f"), with_interval(result.margin_against, "+.2f")
        lines.append(f"{result.arm:<{width}}{accuracy:<23}{better:<26}{margin:<22}{wider}")
    return lines


def to_csv(results: list[HeldoutResult]) -> str:
    """The results as CSV, one line for each arm."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = ("accuracy", "against", "margin", "margin_against")
    writer.writerow(["arm", "pairs", "seeds", *(f"{name}{end}" for name in names for end in ("", "_low", "_high"))])
    for result in results:
        estimates = [getattr(result, name) for name in names]
        numbers = [value for each in estimates for value in (each.mean, each.low, each.high)]
        writer.writerow([result.arm, result.pairs, result.seeds, *(round(number, 6) for number in numbers)])
    return buffer.getvalue()
