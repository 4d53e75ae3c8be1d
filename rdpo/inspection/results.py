"""Results of two runs, A and B, side by side.

Every interval is a 95% percentile interval of a bootstrap over prompts; that of a difference is paired, over the
prompts that both have evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from rdpo.evaluation.compare import Estimate, bootstrap, with_interval
from rdpo.execution.keys import without_placement
from rdpo.files.stage_folder import Manifest
from rdpo.records import ID_COLUMN, Row

Pick = Callable[[Row], float | None]
NAME, COLUMN = 28, 28


def result_lines(
    a: Mapping[str, Manifest], b: Mapping[str, Manifest], rows_a: list[Row], rows_b: list[Row], seed: int
) -> list[str]:
    """The results as lines of text; none where both runs have the same, or none.

    Args:
        a: manifests of run A by stage.
        b: those of run B.
        rows_a: evaluated rows of run A, by id.
        rows_b: those of run B.
        seed: seed of the bootstrap.
    """
    stages = ("training", "retention", "evaluation")
    if all(_digest(a, stage) == _digest(b, stage) for stage in stages):
        return []
    lines = [f"{'':<{NAME}}{'A':<{COLUMN}}{'B':<{COLUMN}}B - A"]
    lines += [f"{name:<{NAME}}{of_a:<{COLUMN}}{of_b}".rstrip() for name, of_a, of_b in _measures(a, b)]
    if not (rows_a and rows_b):
        without = [side for side, rows in (("A", rows_a), ("B", rows_b)) if not rows]
        return [*lines, f"no evaluation in {' and '.join(without)} yet"]
    common = len({row[ID_COLUMN] for row in rows_a} & {row[ID_COLUMN] for row in rows_b})
    lines.append(f"held-out prompts: {len(rows_a)} and {len(rows_b)}, of which both have {common}")
    lines += [_line(name, pick, rows_a, rows_b, seed) for name, pick in _picks(rows_a[0], rows_b[0]).items()]
    return [*lines, *_warnings(a["evaluation"], b["evaluation"])]


def _digest(manifests: Mapping[str, Manifest], stage: str) -> str | None:
    return manifests[stage].digest if stage in manifests else None


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
        picks[f"{reward}, start"] = lambda row, reward=reward: row["start_scores"][reward]  # type: ignore[misc]
        picks[f"{reward}, trained"] = lambda row, reward=reward: row["trained_scores"][reward]  # type: ignore[misc]
        picks[f"{reward}, win rate"] = lambda row, reward=reward: _win(row, reward)  # type: ignore[misc]
    picks["KL, nats"] = lambda row: row["kl"]
    picks["tokens"] = lambda row: row["trained_tokens"]
    picks["stop rate"] = lambda row: float(row["trained_finish_reason"] == "stop")
    return picks


def _win(row: Row, reward: str) -> float | None:
    """1 where the trained model beats its start, half for a tie."""
    start, trained = row["start_scores"][reward], row["trained_scores"][reward]
    if start is None or trained is None:
        return None
    return 1.0 if trained > start else 0.5 if trained == start else 0.0


def _line(name: str, pick: Pick, rows_a: list[Row], rows_b: list[Row], seed: int) -> str:
    values = [{row[ID_COLUMN]: pick(row) for row in rows} for rows in (rows_a, rows_b)]
    known = [{prompt: value for prompt, value in side.items() if value is not None} for side in values]
    differences = [known[1][prompt] - known[0][prompt] for prompt in known[0] if prompt in known[1]]
    a, b = (_estimate(list(side.values()), seed, ".3f") for side in known)
    return f"{name:<{NAME}}{a:<{COLUMN}}{b:<{COLUMN}}{_estimate(differences, seed, '+.3f')}"


def _estimate(values: list[float], seed: int, form: str) -> str:
    return with_interval(bootstrap(np.array(values, dtype=float), seed), form) if values else "-"


def _warnings(a: Manifest, b: Manifest) -> Iterator[str]:
    """Rewards whose scores are not on one scale, because they are not the same in both runs."""
    of_a, of_b = ({one["name"]: one for one in side.settings["rewards"]} for side in (a, b))
    for name in [name for name in of_a if name in of_b]:
        if without_placement({**of_a[name], "weight": 0}) != without_placement({**of_b[name], "weight": 0}):
            yield f"{name} is not the same reward in both runs: its scores cannot be compared"
    for side, names in (("A", of_a.keys() - of_b.keys()), ("B", of_b.keys() - of_a.keys())):
        for name in sorted(names):
            yield f"{name} is a reward of {side} alone"
