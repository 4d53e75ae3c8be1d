"""report.html: one self-contained page of what a run did, in the order of the data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol, TypeVar

import numpy as np
from markupsafe import Markup

from rdpo.config import Job
from rdpo.evaluation.compare import KL_ANSWERS, LOG_RATIO, MODELS
from rdpo.evaluation.intervals import Estimate, Values, with_interval
from rdpo.evaluation.suites.findings import Finding, verdict
from rdpo.execution.reader import RunReader
from rdpo.execution.run import Run
from rdpo.files.folder import IN_PROGRESS
from rdpo.files.manifest import Manifest
from rdpo.report import charts
from rdpo.report.alerts import alerts
from rdpo.report.columns import PairColumns, PromptColumns, pair_columns, prompt_columns, prompt_lengths
from rdpo.report.page import SCRIPT, write_page
from rdpo.report.provenance import sources
from rdpo.report.samples import Conversation, Sample, conversations, evaluated_samples
from rdpo.stages.table import WITHOUT_ROWS, names_of
from rdpo.synthesis.made import writer_named
from rdpo.synthesis.voices import models_named
from rdpo.training.metrics import StepMetrics

CURVES = {
    "loss": ["loss"],
    "loss of the held-out pairs": ["heldout/loss"],
    "accuracy of the implicit rewards": ["rewards/accuracies"],
    "margin of the implicit rewards": ["rewards/margins"],
    "implicit rewards": ["rewards/chosen", "rewards/rejected"],
    "log-probs of the answers (nats)": ["logps/chosen", "logps/rejected"],
    "gradient norm": ["grad_norm"],
    "learning rate": ["learning_rate"],
    "tokens per second": ["tokens_per_second"],
    "model FLOPs utilisation": ["mfu"],
    "peak memory (GiB)": ["peak_memory_gib"],
}
EVERY_S = 180.0
"""A page takes seconds to write, which a run of minutes should not spend on every stage."""
EXTREMES = 3
"""Answers that gained most, and as many that lost most, shown before the others."""

T = TypeVar("T")
Manifests = dict[str, Manifest]
Section = dict[str, Any]
"""What one part of the page is filled with."""


class Keep(Protocol):
    """Makes a value of a stage's files, or has it from when they were the same."""

    def __call__(self, stage: str, make: Callable[[], T], /) -> T:
        """The value of a stage."""


def _made(stage: str, make: Callable[[], T], /) -> T:
    return make()


def write_report(run_dir: str, under_way: bool = False) -> str:
    """Write the report of a run, as far as the run has come; its path.

    Args:
        run_dir: the run.
        under_way: more is to come; a browser that shows the page loads it anew now and then.

    Raises:
        InputError: there is no run in this directory.
    """
    run = RunReader(run_dir)
    content = report_content(run)
    return write_page(
        run_dir,
        "report.html.jinja",
        script=SCRIPT,
        unfinished=_unfinished(run, [name for name in names_of(run.job) if name not in content["manifests"]]),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()) if under_way else None,
        **content,
    )


def report_content(run: RunReader, keep: Keep = _made) -> Section:
    """What the sections of a run's report are filled with, as far as the run has come.

    Args:
        run: the run.
        keep: makes what is drawn of a stage's files, or has it from before.
    """
    job, manifests = run.job, run.finished(names_of(run.job))
    summaries = {name: manifest.summary for name, manifest in manifests.items()}
    pairs = keep("pairs", lambda: _pairs(run)) if "pairs" in manifests else None
    return {
        "job": job,
        "speakers": models_named(job),
        "writer": writer_named(job),
        "run_dir": run.dir,
        "settings": json.dumps(job.model_dump(mode="json", exclude_none=True), indent=2, ensure_ascii=False),
        "manifests": manifests,
        "without_rows": WITHOUT_ROWS,
        "seconds": _seconds(manifests),
        "summaries": summaries,
        "alerts": alerts(manifests, pairs["columns"] if pairs else None),
        "prompts": keep("prompts", lambda: _prompts(run)) if "prompts" in manifests else None,
        "conversations": keep("synthesis", lambda: _conversations(run)) if "synthesis" in manifests else [],
        "scores": {**pairs["scores"], "right": _right(job, summaries)} if pairs else None,
        "pairs": pairs,
        "training": keep("training", lambda: _training(run)),
        "evaluation": _evaluation_of(run, summaries, keep),
        "suites": _suites(summaries.get("suites", {}).get("findings", [])),
        "sources": sources(manifests, job.student.described),
    }


class ReportSoFar:
    """Writes the report of a run while it runs, after a stage but not more often than every so many seconds.

    A page that fails is reported, and does not end the run.
    """

    def __init__(self, every_s: float = EVERY_S):
        self.every_s, self.written = every_s, time.monotonic()

    def __call__(self, run: Run) -> None:
        """A stage of the run is made."""
        if time.monotonic() - self.written < self.every_s:
            return
        try:
            write_report(run.dir, under_way=True)
        except Exception as error:
            run.console.warn(f"no report yet: {type(error).__name__}: {error}")
        self.written = time.monotonic()


def headline(run_dir: str) -> list[str]:
    """The result of a run in a few lines of text."""
    run = RunReader(run_dir)
    summaries = {name: manifest.summary for name, manifest in run.finished(names_of(run.job)).items()}
    summary, retention = summaries.get("evaluation", {}), summaries.get("retention")
    lines = []
    for reward in summary.get("rewards", []):
        rate, kind = reward["win_rate"], "optimised" if reward["weight"] else "independent"
        lines.append(
            f"win rate    {rate['mean']:.3f} (95% interval {rate['low']:.3f} to {rate['high']:.3f}) of the trained "
            f"model by {reward['reward']}, {kind}; mean {reward['start_mean']:.3f} -> {reward['trained_mean']:.3f}"
        )
        if even := reward.get("length_controlled"):
            lines.append(f"{'':<12}{with_interval(Estimate(**even), '.3f')} if all answers were equally long")

    if summary.get("length"):
        length = {side: value["mean"] for side, value in summary["length"].items()}
        stop = {side: value["mean"] for side, value in summary["stop_rate"].items()}
        lines.append(
            f"on {summary['prompts']} held-out prompts: {_moved(summary)}tokens "
            f"{length['start']:.0f} -> {length['trained']:.0f}, stop rate {stop['start']:.2f} -> {stop['trained']:.2f}"
        )

    if retention:
        factor = retention["perplexity_factor"]
        interval = f"95% interval {factor['low']:.3f} to {factor['high']:.3f}"
        lines.append(
            f"on {retention['texts']} other texts: perplexity {factor['mean']:.3f} times the start model's ({interval})"
        )
    return lines


def _moved(summary: Section) -> str:
    """How far the trained model is from its start, by the name of what was measured; nothing if nothing was."""
    if not summary.get("kl"):
        return ""
    estimate = with_interval(Estimate(**summary["kl"]), ".1f")
    return f"{'KL' if KL_ANSWERS in summary else LOG_RATIO} {estimate} nats, "


def _seconds(manifests: Manifests) -> float:
    """Time of all stages; those that ran together count once."""
    counted: list[str] = []
    for name, manifest in manifests.items():
        if not set(manifest.together) & set(counted):
            counted.append(name)
    return sum(manifests[name].seconds for name in counted)


def _unfinished(run: RunReader, stages: Sequence[str]) -> dict[str, int]:
    """Rows that those of the stages have stored so far that are begun."""
    folders = {name: run.folder(name) for name in stages}
    return {name: folder.count() for name, folder in folders.items() if folder.exists(IN_PROGRESS)}


def _prompts(run: RunReader) -> Section:
    lengths = prompt_lengths(run.folder("prompts"))
    return {
        "lengths": charts.histogram({"prompts": lengths}, "tokens of the prompt", "prompts", [charts.AFTER]),
        "median": float(np.median(lengths)),
        "longest": float(lengths.max()),
    }


def _conversations(run: RunReader) -> list[Conversation]:
    return conversations(run.folder("synthesis"), run.job)


def _right(job: Job, summaries: Mapping[str, Section]) -> dict[str, float]:
    """The share of the known pairs that each reward orders rightly."""
    # Without known pairs of the user's the trial says only that the models load.
    right: dict[str, float] = summaries.get("calibration", {}).get("right", {}) if job.calibration.source else {}
    return right


def _scores(pairs: PairColumns) -> Section:
    """What each reward says of the pairs, and how far they agree."""
    drawn = {}
    for name in pairs.chosen:
        sides = {"rejected": pairs.rejected[name], "chosen": pairs.chosen[name]}
        drawn[name] = charts.histogram(sides, name, "pairs", [charts.OTHER, charts.AFTER])
    return {"charts": drawn, "same_side": pairs.same_side()}


def _pairs(run: RunReader) -> Section:
    columns = pair_columns(run.folder("pairs"))
    return {"columns": columns, "charts": _pair_charts(columns), "scores": _scores(columns)}


def _pair_charts(pairs: PairColumns) -> dict[str, Markup]:
    gaps = {"kept": pairs.kept_gaps, "dropped": pairs.dropped_gaps}
    lengths = {"rejected": pairs.rejected_chars, "chosen": pairs.chosen_chars}
    drawn = {}

    if any(map(len, gaps.values())):
        label = "score of chosen minus score of rejected"
        drawn["reward gap"] = charts.histogram(gaps, label, "pairs", [charts.AFTER, charts.BEFORE])

    if len(pairs.kept_gaps):
        drawn["length of the answers"] = charts.histogram(lengths, "characters", "pairs", [charts.OTHER, charts.AFTER])
        longer = pairs.chosen_chars - pairs.rejected_chars
        drawn["reward gap by length"] = charts.scatter(
            longer, pairs.kept_gaps, "characters that chosen is longer", "reward gap"
        )

    return drawn


def _training(run: RunReader) -> Section | None:
    """The curves as far as training has written them down."""
    steps = run.metrics
    if not steps:
        return None

    series = {name: series_of(steps, name) for name in set(chain.from_iterable(steps))}
    drawn = {title: _curves(series, names) for title, names in CURVES.items()}
    return {
        "charts": {title: drawing for title, drawing in drawn.items() if drawing},
        "steps": len(steps),
        "skipped": int(np.nansum(series.get("skipped", 0))),
        "first": steps[0],
        "last": steps[-1],
    }


def series_of(steps: Sequence[StepMetrics], name: str) -> Values:
    """A metric (n,) over the steps, NaN where a step does not have it."""
    return np.array([step.get(name) for step in steps], dtype=float)


def _curves(series: Mapping[str, Values], metrics: Sequence[str]) -> Markup | None:
    """Metrics over the steps at which they were measured; None if they never were."""
    names = [name for name in metrics if name in series]
    measured = np.isfinite([series[name] for name in names]).any(0) if names else np.array(False)
    if not measured.any():
        return None
    drawn = {name.rsplit("/", 1)[-1]: series[name][measured] for name in names}
    return charts.curves(series["step"][measured], drawn)


def _evaluation_of(run: RunReader, summaries: Mapping[str, Section], keep: Keep) -> Section | None:
    if not summaries.get("evaluation", {}).get("prompts"):
        return None
    return keep("evaluation", lambda: _evaluation(run))


def _evaluation(run: RunReader) -> Section:
    folder = run.folder("evaluation")
    columns = prompt_columns(folder)
    samples = evaluated_samples(folder, columns, run.job.evaluation.samples)
    return {
        "charts": {name: _reward_charts(columns, name) for name in columns.rewards},
        "by_length": {name: columns.by_length(name) for name in columns.rewards},
        "sorts": [*columns.rewards, "tokens"],
        "samples": samples,
        "extremes": _extremes(samples),
        "total": len(columns.ids),
    }


def _reward_charts(columns: PromptColumns, reward: str) -> dict[str, Markup]:
    scored = columns.scored(reward)
    start, trained = (columns.scores[model][reward][scored] for model in MODELS)
    models = {"start model": start, "trained model": trained}
    return {
        "scores": charts.histogram(models, reward, "prompts"),
        "each prompt, before and after": charts.scatter(start, trained, "start model", "trained model", diagonal=True),
        "gain by growth": charts.scatter(
            columns.growth[scored], trained - start, "tokens that the answer grew", f"gain in {reward}"
        ),
    }


def _suites(found: Sequence[Finding]) -> list[Section]:
    """The findings of the suites, each with what its difference says."""
    return [{**one, "verdict": verdict(one)} for one in found]


def _extremes(samples: list[Sample]) -> dict[str, list[Sample]]:
    ordered = sorted(samples, key=lambda sample: sample.gain)
    gained = [sample for sample in ordered[::-1][:EXTREMES] if sample.gain > 0]
    lost = [sample for sample in ordered[:EXTREMES] if sample.gain < 0]
    return {title: extremes for title, extremes in (("gained most", gained), ("lost most", lost)) if extremes}
