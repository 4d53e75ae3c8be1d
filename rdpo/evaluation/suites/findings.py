"""What the suites have found: each measure under both models, with its difference.

Every interval is at 95%, over the items of a suite, and paired: each item is answered by both models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rdpo.config import Suite
from rdpo.evaluation.compare import MODELS
from rdpo.evaluation.intervals import NORMAL, Estimate, Values, mean_interval, with_interval
from rdpo.evaluation.suites.kinds import KINDS, Measure
from rdpo.records import Row
from rdpo.tracking.tables import aligned

Finding = dict[str, Any]
"""A measure of one suite: its name, whether more of it is better, on how many items, and what both models have."""
ByItem = Mapping[str, Sequence[Row]]


def findings(suite: Suite, rows: Sequence[Row]) -> list[Finding]:
    """The measures of a suite on its measured rows; none of a measure that no item has."""
    found = []
    for measure in KINDS[suite.kind].measures:
        values = {model: _values(rows, measure, model) for model in MODELS}
        if not len(values[MODELS[0]]):
            continue
        start, trained = (values[model] for model in MODELS)
        means = {model: float(values[model].mean()) for model in MODELS}
        difference = asdict(_interval(trained - start))
        about = {"suite": suite.named, "kind": suite.kind, "measure": measure.name, "better": measure.better}
        found.append({**about, "items": len(start), **means, "difference": difference})
    return found


def _interval(gains: Values) -> Estimate:
    """The mean of the items' differences (items,) with its interval."""
    if np.ptp(gains):
        return mean_interval(gains)
    # No item differs from the others: only what was not seen can move the mean, as in `share_interval`.
    mean, unseen = float(gains[0]), NORMAL**2 / (len(gains) + NORMAL**2)
    return Estimate(mean, mean - unseen, mean + unseen)


def _values(rows: Sequence[Row], measure: Measure, model: str) -> Values:
    """What a measure is of each item (items,), in the order of their ids; of those that have all that it needs."""
    more = _means(rows, measure.of, model)
    less = _means(rows, measure.minus, model) if measure.minus else dict.fromkeys(more, 0.0)
    return np.array([more[item] - less[item] for item in sorted(more.keys() & less.keys())])


def _means(rows: Sequence[Row], variant: str, model: str) -> dict[str, float]:
    """The mean value of each item's answers to a variant."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["variant"] == variant:
            values[row["item"]].append(row[f"{model}_value"])
    return {item: float(np.mean(of_item)) for item, of_item in values.items()}


def verdict(finding: Finding) -> str:
    """What the difference says: `better`, `worse`, or that it cannot be told from none.

    Where neither is better it is `more` or `less`.
    """
    difference = Estimate(**finding["difference"])
    if not (difference.low > 0 or difference.high < 0):
        return "no difference seen"
    if not finding["better"]:
        return "more" if difference.mean > 0 else "less"
    return "better" if (difference.mean > 0) == (finding["better"] > 0) else "worse"


def table(found: Sequence[Finding]) -> list[str]:
    """The findings as lines of text."""
    cells = [["suite", "measure", "items", "start", "trained", "difference (95%)", ""]]
    for one in found:
        difference = with_interval(Estimate(**one["difference"]), "+.3f")
        figures = [str(one["items"]), *(f"{one[model]:.3f}" for model in MODELS), difference]
        cells.append([one["suite"], one["measure"], *figures, verdict(one)])
    return aligned(cells, right=[2, 3, 4])
