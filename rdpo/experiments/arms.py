"""Arms of a comparison on the same held-out prompts: each against the start model and against one of them.

Every interval is at 95% and paired, over prompts and over seeds where there are several (see
`rdpo.evaluation.intervals`).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from rdpo.evaluation.compare import measures_kl
from rdpo.evaluation.intervals import Estimate, Values, groups_of, mean_interval, share_interval, wins, with_interval
from rdpo.records import Row, by_id
from rdpo.tracking.tables import aligned


@dataclass(frozen=True)
class ArmResult:
    """What one reward says of one arm, over the prompts that all arms answered with all seeds.

    `kl` is None where it was not measured: by self-refinement, or by a version that did not draw answers for it.
    """

    arm: str
    reward: str
    weight: float
    prompts: int
    seeds: int
    start_mean: float
    mean: float
    difference: Estimate
    wins_start: Estimate
    wins_baseline: Estimate
    kl: Estimate | None
    tokens: float


Evaluated = dict[tuple[str, int], list[Row]]
"""Rows of the evaluation stage by arm and seed."""

Weights = Mapping[str, Mapping[str, float]]
"""Weights of the same rewards in each arm, by the arm's name."""


def arm_results(evaluated: Evaluated, weights: Weights, rivals: dict[str, str]) -> list[ArmResult]:
    """Every reward's verdict on every arm, the optimised rewards first; `rivals`: what each arm is held against."""
    arms = list(dict.fromkeys(arm for arm, _ in evaluated))
    runs = {run: by_id(rows) for run, rows in evaluated.items()}
    prompts = sorted(set.intersection(*map(set, runs.values())))
    if not prompts:
        return []

    by_arm: dict[str, list[dict[str, Row]]] = {arm: [] for arm in arms}
    for (arm, _), rows in runs.items():
        by_arm[arm].append(rows)

    found = []
    for reward in sorted(weights[arms[0]], key=lambda reward: not any(weights[arm][reward] for arm in arms)):
        for arm in arms:
            weight, rival = weights[arm][reward], by_arm[rivals[arm]]
            found.append(_result(arm, reward, weight, by_arm[arm], rival, prompts))
    return found


def _result(
    arm: str,
    reward: str,
    weight: float,
    runs: list[dict[str, Row]],
    others: list[dict[str, Row]],
    prompts: list[str],
) -> ArmResult:
    start, trained = (_scores(runs, prompts, f"{side}_scores", reward) for side in ("start", "trained"))
    rival = _scores(others, prompts, "trained_scores", reward)
    groups = groups_of([runs[0][prompt] for prompt in prompts])

    tied = Estimate(0.5, 0.5, 0.5)
    return ArmResult(
        arm=arm,
        reward=reward,
        weight=weight,
        prompts=len(set(groups)),
        seeds=len(runs),
        start_mean=float(start.mean()),
        mean=float(trained.mean()),
        difference=mean_interval(trained - start, groups),
        wins_start=share_interval(wins(trained, start), groups),
        # An arm against itself is no measurement.
        wins_baseline=tied if runs is others else share_interval(wins(trained, rival), groups),
        kl=_divergence(runs, prompts),
        tokens=float(_values(runs, prompts, lambda row: row["trained_tokens"]).mean()),
    )


def _values(runs: list[dict[str, Row]], prompts: list[str], pick: Callable[[Row], float]) -> Values:
    """Values (seeds, prompts)."""
    table = []
    for run in runs:
        table.append([pick(run[prompt]) for prompt in prompts])
    return np.array(table, dtype=float)


def _scores(runs: list[dict[str, Row]], prompts: list[str], column: str, reward: str) -> Values:
    """Scores (seeds, prompts)."""
    return _values(runs, prompts, lambda row: row[column][reward])


def _divergence(runs: list[dict[str, Row]], prompts: list[str]) -> Estimate | None:
    """KL on the prompts on which it was measured with every seed."""
    measured = [prompt for prompt in prompts if _all_measure_kl(runs, prompt)]
    if not measured:
        return None

    groups = groups_of([runs[0][prompt] for prompt in measured])
    return mean_interval(_values(runs, measured, lambda row: row["kl"]), groups)


def _all_measure_kl(runs: list[dict[str, Row]], prompt: str) -> bool:
    return all(measures_kl(run[prompt]) for run in runs)


def coverage(what: str, measured: Mapping[tuple[str, int], Collection[str]]) -> list[str]:
    """How many held-out prompts or pairs each run was measured on, and how many of them all runs share, as text.

    `measured` are their ids by arm and seed. Only what is shared stands in the tables.
    """
    if not measured:
        return []
    sizes = sorted({len(ids) for ids in measured.values()})
    range_of = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    shared = len(set.intersection(*map(set, measured.values())))
    line = f"held-out {what}: {range_of} evaluated in each of {len(measured)} runs, {shared} in all of them"
    return ["", line if shared else f"{line}; nothing can be compared"]


def table(results: list[ArmResult], baseline: str) -> list[str]:
    """The results as lines of text, a block for each reward."""
    head = ["", "mean", "against start (95%)", "beats start", f"beats {baseline}", "KL, nats", "tokens"]
    lines = []
    for reward, of_reward in by_reward(results).items():
        prompts, seeds = of_reward[0].prompts, of_reward[0].seeds
        lines += ["", f"{reward} ({use_of(of_reward)}), {prompts} prompts, {seeds} seeds"]
        lines += aligned([head, *map(_cells, of_reward)], right=[1, 6])
    return lines


def by_reward(results: list[ArmResult]) -> dict[str, list[ArmResult]]:
    """The results of each reward, by its name."""
    # They come reward by reward, so that neighbours are all of a reward.
    return {name: list(found) for name, found in groupby(results, lambda result: result.reward)}


def use_of(results: list[ArmResult]) -> str:
    """Whether the arms optimise the reward that these results are of."""
    users = [result.arm for result in results if result.weight]
    if len(users) == len(results):
        return "optimised"
    return f"optimised by {', '.join(users)}" if users else "independent"


def _cells(result: ArmResult) -> list[str]:
    return [
        result.arm,
        f"{result.mean:.3f}",
        with_interval(result.difference, "+.3f"),
        with_interval(result.wins_start, ".2f"),
        with_interval(result.wins_baseline, ".2f"),
        with_interval(result.kl, ".1f") if result.kl else "-",
        f"{result.tokens:.0f}",
    ]


def to_csv(results: list[ArmResult]) -> str:
    """The results as CSV, one line for each arm and reward."""
    estimates = ("difference", "wins_start", "wins_baseline", "kl")
    plain = ("arm", "reward", "weight", "prompts", "seeds", "start_mean", "mean", "tokens")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*plain, *estimate_columns(estimates)])
    for result in results:
        measured = [getattr(result, name) or Estimate(math.nan, math.nan, math.nan) for name in estimates]
        writer.writerow([*(getattr(result, name) for name in plain), *estimate_figures(measured)])
    return buffer.getvalue()


def estimate_columns(names: Iterable[str]) -> list[str]:
    """The columns of estimates in a CSV file: each has three."""
    columns = []
    for name in names:
        columns += [name, f"{name}_low", f"{name}_high"]
    return columns


def estimate_figures(estimates: Sequence[Estimate]) -> list[float]:
    """What stands in these columns."""
    figures = []
    for estimate in estimates:
        figures += [round(value, 6) for value in (estimate.mean, estimate.low, estimate.high)]
    return figures
