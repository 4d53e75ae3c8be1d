"""Two runs, A and B, in one live page: what differs, the curves of both in one chart, and what both have answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow.compute as pc
from markupsafe import Markup

from rdpo.evaluation.compare import MODELS
from rdpo.evaluation.intervals import Values
from rdpo.execution.reader import RunReader
from rdpo.inspection.diff import Side, results, setting_lines
from rdpo.inspection.status import RunStatus
from rdpo.records import ID_COLUMN, Row, by_id, digest, shown, text_of
from rdpo.report import charts
from rdpo.report.live import Body, LiveRun, Progress, one_run, progress_of
from rdpo.report.page import escaped, rendered
from rdpo.report.report import CURVES, series_of
from rdpo.report.samples import ID_DIGITS, rows_with, turns_of
from rdpo.training.metrics import StepMetrics

SAMPLES = 50
ANSWERED = {"evaluation": MODELS[1:], "synthesis": ()}
"""Stages whose answers stand side by side, the first of which both have rows, and what is shown of them; else all."""


@dataclass(frozen=True)
class Both:
    """A prompt with what each run has answered: labels and texts, A and B in turn."""

    id: str
    prompt: Markup
    texts: list[tuple[str, Markup]]


class LivePair:
    """Two runs.

    Raises:
        InputError: there is no run in one of the directories, or there are several.
    """

    def __init__(self, run_dirs: tuple[str, str]):
        self.runs: dict[str, LiveRun] = dict(zip("AB", map(one_run, run_dirs), strict=True))
        self.title = " and ".join(run.title for run in self.runs.values())

    def key(self) -> str:
        """A hash of what is seen of the files of both."""
        return digest([run.key() for run in self.runs.values()])

    def statuses(self) -> list[RunStatus]:
        """How far both have come."""
        return [status for run in self.runs.values() for status in run.statuses()]

    def progress(self) -> list[Progress]:
        """The stages of both."""
        named = zip(self.runs, self.statuses(), strict=True)
        return [progress_of(status, f"{side}  {status.run_dir}") for side, status in named]

    def body(self) -> Body:
        """What differs in settings and results, curves, and answers."""
        a, b = (Side(run.dir) for run in self.runs.values())
        stage, samples = _samples(a, b)
        return Body(
            rendered("pair_header.html.jinja", title=self.title),
            rendered(
                "pair.html.jinja",
                settings=list(map(shown, setting_lines(a, b))),
                results=list(map(shown, results(a, b))),
                charts=_charts({"A": a.metrics, "B": b.metrics}),
                stage=stage,
                samples=samples,
            ),
        )


def _charts(steps: Mapping[str, Sequence[StepMetrics]]) -> dict[str, Markup]:
    """A chart for each metric that both or one of the runs has measured."""
    drawn = {}
    for title, metrics in CURVES.items():
        for metric in metrics:
            lines = {run: _line(of_run, metric) for run, of_run in steps.items()}
            known = {run: line for run, line in lines.items() if len(line[0])}
            colours = [charts.PALETTE["AB".index(run)] for run in known]
            if known:
                name = title if len(metrics) == 1 else f"{title}: {metric.rsplit('/', 1)[-1]}"
                drawn[name] = charts.lines(known, colours)
    return drawn


def _line(steps: Sequence[StepMetrics], metric: str) -> tuple[Values, Values]:
    """The steps at which a metric was measured, and its values."""
    values = series_of(steps, metric)
    measured = np.isfinite(values)
    return series_of(steps, "step")[measured], values[measured]


def _samples(a: RunReader, b: RunReader) -> tuple[str, list[Both]]:
    """The first prompts, by id, that both runs have answered, and the stage whose rows they are."""
    for stage, turns in ANSWERED.items():
        folders = [run.folder(stage) for run in (a, b)]
        ids = [folder.ids(ID_COLUMN) for folder in folders]
        common = pc.unique(ids[0].filter(pc.is_in(ids[0], ids[1])))
        if len(common):
            chosen = sorted(common.to_pylist())[:SAMPLES]
            rows = [by_id(rows_with(folder, chosen)) for folder in folders]
            return stage, [_both(rows[0][name], rows[1][name], turns) for name in chosen]
    return "", []


def _both(a: Row, b: Row, turns: Sequence[str]) -> Both:
    names = turns or dict.fromkeys(chain(turns_of(a), turns_of(b)))
    texts = chain.from_iterable(_texts(name, {"A": a, "B": b}) for name in names)
    return Both(a[ID_COLUMN][:ID_DIGITS], escaped(text_of(a["prompt"])), list(texts))


def _texts(turn: str, rows: Mapping[str, Row]) -> Iterator[tuple[str, Markup]]:
    for run, row in rows.items():
        if row.get(turn) is None:
            continue
        scores = (row.get(f"{turn}_scores") or {}).items()
        said = [f"{name} {score:.2f}" for name, score in scores if score is not None]
        yield " · ".join([run, turn, *said]), escaped(row[turn])
