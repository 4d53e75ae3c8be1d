"""Negative controls of a comparison: arms that cannot be better than the baseline, unless something else is at work.

A control that beats the baseline says that what was measured rewards something that both have in common with the other
arms: more noise, another scale of the loss, a longer way from the start. The gain of the others is then not shown to be
what they are named after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rdpo.config.comparison import Comparison
from rdpo.evaluation.intervals import with_interval
from rdpo.experiments.arms import ArmResult
from rdpo.experiments.heldout import HeldoutResult
from rdpo.experiments.measured import arm_of


def control_lines(
    comparison: Comparison, results: Sequence[ArmResult], heldout: Sequence[HeldoutResult]
) -> Iterator[str]:
    """What the controls say, a line for each measure by which one beats its baseline; none without controls."""
    controls = {str(variant) for variant in comparison.variants if variant.arm in comparison.controls}
    if not controls:
        return
    found = [*_by_answers(controls, results, comparison), *_by_pairs(controls, heldout, comparison)]
    if found:
        yield from found
        yield "what the other arms gain by these measures is not shown to be their own doing"
    elif results or heldout:
        yield f"no control beats {comparison.baseline}: {', '.join(sorted(controls))}"


def _by_answers(controls: set[str], results: Sequence[ArmResult], comparison: Comparison) -> Iterator[str]:
    for result in results:
        if arm_of(result.arm) in controls and result.wins_baseline.low > 0.5:
            rate = with_interval(result.wins_baseline, ".2f")
            yield f"the control {result.arm} beats {comparison.baseline} by {result.reward}: win rate {rate}"


def _by_pairs(controls: set[str], heldout: Sequence[HeldoutResult], comparison: Comparison) -> Iterator[str]:
    for result in heldout:
        if result.arm in controls and result.against.low > 0:
            more = with_interval(result.against, "+.3f")
            yield f"the control {result.arm} beats {comparison.baseline} on held-out pairs: accuracy {more}"
