"""Results of two runs, A and B, side by side.

Every interval is at 95%, over prompts; that of a difference is paired, over the prompts that both have evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from rdpo.evaluation.compare import KL_ANSWERS, MODELS
from rdpo.evaluation.intervals import Estimate, groups_of, mean_interval, share_interval, with_interval
from rdpo.execution.keys import what_counts
from rdpo.files.manifest import Manifest
from rdpo.records import ID_COLUMN, Row

Pick = Callable[[Row], float | None]
"""Takes a number out of an evaluated row, where it has one."""
Measured = list[tuple[Row, float]]
"""Evaluated rows, each with its number."""
NAME, COLUMN = 28, 28
SHARES = ("win rate", "stop rate")
KL, LOG_RATIO = "KL, nats", "log-ratio, nats"
"""The second is that of the answers as they were drawn for the comparison."""


def result_lines(
    a: Mapping[str, Manifest], b: Mapping[str, Manifest], rows_a: list[Row], rows_b: list[Row]
) -> list[str]:
    """The results as lines of text; none where both runs have the same, or none.

    Args:
        a: manifests of run A by stage.
        b: those of run B.
        rows_a: evaluated rows of run A, by id.
        rows_b: those of run B.
    """
    stages = ("training", "retention", "evaluation")
    if all(_making(a, stage) == _making(b, stage) for stage in stages):
        return []

    lines = [f"{'':<{NAME}}{'A':<{COLUMN}}{'B':<{COLUMN}}B - A"]
    lines += [f"{name:<{NAME}}{of_a:<{COLUMN}}{of_b}".rstrip() for name, of_a, of_b in _measures(a, b)]
    if not (rows_a and rows_b):
        without = [side for side, rows in (("A", rows_a), ("B", rows_b)) if not rows]
        return [*lines, f"no evaluation in {' and '.join(without)} yet"]

    common = len({row[ID_COLUMN] for row in rows_a} & {row[ID_COLUMN] for row in rows_b})
    lines.append(f"held-out prompts: {len(rows_a)} and {len(rows_b)}, of which both have {common}")
    lines += [_line(name, pick, rows_a, rows_b) for name, pick in _picks(rows_a[0], rows_b[0]).items()]
    lines += _divergence(a["evaluation"], b["evaluation"], rows_a, rows_b)
    return [*lines, *_warnings(a["evaluation"], b["evaluation"])]


def _making(manifests: Mapping[str, Manifest], stage: str) -> tuple[str, str] | None:
    return (manifests[stage].key, manifests[stage].digest) if stage in manifests else None


def _measures(a: Mapping[str, Manifest], b: Mapping[str, Manifest]) -> Iterator[tuple[str, str, str]]:
    """What training and retention have left in figures, where either has."""
    sides = [dict(_figures(side)) for side in (a, b)]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        yield name, sides[0].get(name, "-"), sides[1].get(name, "-")


def _figures(manifests: Mapping[str, Manifest]) -> Iterator[tuple[str, str]]:
    training = manifests["training"].summary if "training" in manifests else {}
    if training.get("steps"):
        yield "pairs, steps", f"{training['pairs']}, {training['steps']}"
        yield "last loss", f"{training['last']['loss']:.4f}"
        yield "last margin", f"{training['last']['rewards/margins']:.3f}"
    if heldout := training.get("heldout"):
        yield "accuracy on held-out pairs", f"{heldout['accuracy']:.3f} of {heldout['pairs']}"
    if "retention" in manifests:
        yield (
            "perplexity of other texts",
            with_interval(Estimate(**manifests["retention"].summary["perplexity_factor"]), ".3f"),
        )


def _picks(a: Row, b: Row) -> dict[str, Pick]:
    """The figures of an evaluated row, of every reward that both runs have and of the answers."""
    picks: dict[str, Pick] = {}
    for reward in [name for name in a["trained_scores"] or () if name in (b["trained_scores"] or ())]:
        for model in MODELS:
            picks[f"{reward}, {model}"] = _score_by(reward, model)
        picks[f"{reward}, win rate"] = partial(_win, reward)
    picks["tokens"] = lambda row: row["trained_tokens"]
    picks["stop rate"] = lambda row: float(row["trained_finish_reason"] == "stop")
    return picks


def _score_by(reward: str, model: str) -> Pick:
    return lambda row: row[f"{model}_scores"][reward]


def _win(reward: str, row: Row) -> float | None:
    """1 where the trained model beats its start, half for a tie."""
    start, trained = row["start_scores"][reward], row["trained_scores"][reward]
    if start is None or trained is None:
        return None
    return 1.0 if trained > start else 0.5 if trained == start else 0.0


def _line(name: str, pick: Pick, rows_a: list[Row], rows_b: list[Row]) -> str:
    of_a, of_b = (_measured(pick, rows) for rows in (rows_a, rows_b))
    before = {row[ID_COLUMN]: value for row, value in of_a}
    # Paired: of the rows that both runs have.
    gains = [(row, value - before[row[ID_COLUMN]]) for row, value in of_b if row[ID_COLUMN] in before]

    is_share = name.endswith(SHARES)
    a, b = (_estimate(side, ".3f", is_share) for side in (of_a, of_b))
    return f"{name:<{NAME}}{a:<{COLUMN}}{b:<{COLUMN}}{_estimate(gains, '+.3f')}"


def _measured(pick: Pick, rows: Sequence[Row]) -> Measured:
    picked = ((row, pick(row)) for row in rows)
    return [(row, value) for row, value in picked if value is not None]


def _estimate(measured: Measured, form: str, is_share: bool = False) -> str:
    if not measured:
        return "-"
    values = np.array([value for _, value in measured], dtype=float)
    groups = groups_of([row for row, _ in measured])
    return with_interval((share_interval if is_share else mean_interval)(values, groups), form)


def _divergence(a: Manifest, b: Manifest, rows_a: list[Row], rows_b: list[Row]) -> Iterator[str]:
    """KL, and what earlier versions measured in its place; each with a line where a run has it."""
    kinds = [KL if KL_ANSWERS in side.summary else LOG_RATIO for side in (a, b)]
    for name in (KL, LOG_RATIO):
        sides = [rows if kind == name else [] for kind, rows in zip(kinds, (rows_a, rows_b), strict=True)]
        if any(row["kl"] is not None for row in chain(*sides)):
            yield _line(name, lambda row: row["kl"], *sides)


def _warnings(a: Manifest, b: Manifest) -> Iterator[str]:
    """Rewards whose scores are not on one scale, because they are not the same in both runs."""
    of_a, of_b = _rewards(a), _rewards(b)
    for name in [name for name in of_a if name in of_b]:
        if what_counts({**of_a[name], "weight": 0}) != what_counts({**of_b[name], "weight": 0}):
            yield f"{name} is not the same reward in both runs: its scores cannot be compared"
    for side, names in (("A", of_a.keys() - of_b.keys()), ("B", of_b.keys() - of_a.keys())):
        for name in sorted(names):
            yield f"{name} is a reward of {side} alone"


def _rewards(evaluation: Manifest) -> dict[str, dict[str, Any]]:
    return {reward["name"]: reward for reward in evaluation.settings["rewards"]}
