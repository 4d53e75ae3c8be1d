"""The win rate at equal length against what AlpacaEval publishes, on its own annotations.

    git clone https://github.com/tatsu-lab/alpaca_eval
    python jobs/bench/alpaca_eval.py alpaca_eval

AlpacaEval (arXiv 2404.04475, code and annotations Apache-2.0) fits two things more, the difficulty of each of its
instructions and a baseline that was made longer and shorter on purpose; both need the answers of many models. The table
has all models whose annotations are there, by the smaller share of answers on one side of equal length. Lengths are
characters, as there.
"""

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from rdpo.evaluation.intervals import Estimate, with_interval
from rdpo.evaluation.length_controlled import length_controlled
from rdpo.tracking.tables import aligned

JUDGE = "weighted_alpaca_eval_gpt4_turbo"
BOARD = f"src/alpaca_eval/leaderboards/data_AlpacaEval_2/{JUDGE}_leaderboard.csv"
BANDS = (0.0, 0.05, 0.1, 0.2, 1.0)


@dataclass(frozen=True)
class Model:
    """Win rates of one model, in percent; `beyond` is the fit's without its rule about the lengths that were seen."""

    name: str
    share: float
    won: float
    ours: Estimate | None
    beyond: float
    published: float


def models(clone: Path) -> Iterator[Model]:
    """All models with annotations and a published win rate."""
    with (clone / BOARD).open(encoding="utf-8") as file:
        board = {row[""]: row["length_controlled_winrate"] for row in csv.DictReader(file)}
    for path in sorted(clone.glob(f"results/*/{JUDGE}/annotations.json")):
        name = path.parts[-3]
        if board.get(name):
            rows = json.loads(path.read_text(encoding="utf-8"))
            yield measured(name, [row for row in rows if row.get("preference") is not None], float(board[name]))


def measured(name: str, rows: list[dict[str, object]], published: float) -> Model:
    """One model; AlpacaEval's preference is 1 for the baseline and 2 for the model, or between."""
    won = np.array([min(max(float(str(row["preference"])) - 1, 0.0), 1.0) for row in rows])
    growth = np.array([float(len(str(row["output_2"])) - len(str(row["output_1"]))) for row in rows])
    share = min(float((growth <= 0).mean()), float((growth >= 0).mean()))

    ours, beyond = length_controlled(won, growth), length_controlled(won, growth, seen=0.0)
    assert beyond is not None
    percent = ours and Estimate(100 * ours.mean, 100 * ours.low, 100 * ours.high)
    return Model(name, share, 100 * float(won.mean()), percent, 100 * beyond.mean, published)


def table(found: list[Model]) -> list[str]:
    """Each model, as lines of text."""
    cells = [["model", "rarer side", "win rate", "at equal length", "without the rule", "published"]]
    for one in found:
        ours = with_interval(one.ours, ".2f") if one.ours else ""
        rates = (one.won, one.beyond, one.published)
        won, beyond, published = (f"{rate:.2f}" for rate in rates)
        cells.append([one.name, f"{one.share:.0%}", won, ours, beyond, published])
    return aligned(cells, right=[1, 2, 4, 5])


def distances(found: list[Model]) -> list[str]:
    """How far from the published win rates, on average, by how far lengths overlap."""
    cells = [["rarer side", "models", "win rate", "at equal length", "without the rule"]]
    for low, high in pairwise(BANDS):
        band = [one for one in found if low <= one.share < high]
        if not band:
            continue
        given = [abs(one.ours.mean - one.published) for one in band if one.ours]
        ours = f"{np.mean(given):.2f} of {len(given)}" if given else ""
        won = np.mean([abs(one.won - one.published) for one in band])
        beyond = np.mean([abs(one.beyond - one.published) for one in band])
        cells.append([f"{low:.0%} to {high:.0%}", str(len(band)), f"{won:.2f}", ours, f"{beyond:.2f}"])
    return aligned(cells, right=[1, 2, 3, 4])


def main() -> None:
    """Print both tables."""
    found = sorted(models(Path(sys.argv[1])), key=lambda one: one.share)
    print("\n".join(table(found)))
    print("\nmean distance from the published win rate, in points")
    print("\n".join(distances(found)))


if __name__ == "__main__":
    main()
