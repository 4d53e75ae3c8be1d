"""report.html of a comparison: its arms held against each other on the same held-out prompts and pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from rdpo.evaluation.intervals import Estimate
from rdpo.experiments.arms import ArmResult, by_reward, use_of
from rdpo.experiments.heldout import HeldoutResult
from rdpo.report import charts
from rdpo.report.page import write_page

if TYPE_CHECKING:
    from rdpo.config.comparison import Comparison


def write_comparison(
    run_dir: str,
    comparison: Comparison,
    results: list[ArmResult],
    heldout: list[HeldoutResult],
    controls: Sequence[str] = (),
) -> str:
    """Write the report of a comparison; its path. `controls`: what its negative controls say."""
    rewards = by_reward(results)
    drawn = {}
    for reward, of_reward in rewards.items():
        gains = {result.arm: result.difference for result in of_reward}
        drawn[reward] = _chart(gains, comparison, f"{reward}: gain")

    accuracies = {result.arm: result.accuracy for result in heldout}
    margins = {result.arm: result.margin for result in heldout}
    return write_page(
        run_dir,
        "comparison.html.jinja",
        comparison=comparison,
        rewards=rewards,
        uses={reward: use_of(of_reward) for reward, of_reward in rewards.items()},
        charts=drawn,
        heldout=heldout,
        controls=controls,
        accuracies=_chart(accuracies, comparison, "share of pairs") if heldout else None,
        margins=_chart(margins, comparison, "margin") if heldout else None,
    )


def _chart(estimates: Mapping[str, Estimate], comparison: Comparison, label: str) -> Markup:
    """The arms' figures with their intervals: over the values of what varies, or one row for each arm."""
    if comparison.vary is None:
        return charts.interval_rows(estimates, label)
    lines: dict[str, dict[float, Estimate]] = {}
    for variant in comparison.variants:
        if variant.value is not None and str(variant) in estimates:
            lines.setdefault(variant.arm, {})[variant.value] = estimates[str(variant)]
    if not lines:
        # Rounds of arms: what varies is one thing among two.
        return charts.interval_rows(estimates, label)
    return charts.interval_lines(lines, comparison.vary.key, label)
