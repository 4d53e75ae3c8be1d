"""report.html: one self-contained page of what a run did, in the order of the data.

Charts are SVG drawings inside the page; model text is escaped by the template engine. Nothing is
loaded from elsewhere.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from rdpo.config import Job
from rdpo.evaluation.arms import ArmResult
from rdpo.evaluation.compare import Estimate
from rdpo.evaluation.heldout import HeldoutResult
from rdpo.folder import Folder
from rdpo.pipeline import job_of_run
from rdpo.records import Row, extra_of, text_of, visible
from rdpo.stage_names import STAGES
from rdpo.storage import Manifest, StageFolder
from rdpo.training.metrics import METRICS, NAMES

if TYPE_CHECKING:
    from rdpo.comparison import Comparison

REPORT = "report.html"
SHOWN_CHARS = 4000
BEFORE, AFTER = "#8a8f98", "#2f6fde"
CURVES = {
    "loss": ["loss"],
    "margins and accuracy": ["rewards/margins", "rewards/accuracies"],
    "implicit rewards": ["rewards/chosen", "rewards/rejected"],
    "log-probs (sum, nats)": ["logps/chosen", "logps/rejected"],
    "gradient norm": ["grad_norm"],
    "learning rate": ["learning_rate"],
}


def write_report(run_dir: str) -> str:
    """Write the report of a run, as far as the run has come; its path.

    Raises:
        InputError: there is no run in this directory.
    """
    job = job_of_run(run_dir)
    manifests = _manifests(run_dir)
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            job=job,
            settings=json.dumps(job.model_dump(mode="json", exclude_none=True), indent=2),
            manifests=manifests,
            evaluation=_summary(manifests, "evaluation"),
            training=_summary(manifests, "training"),
            retention=_summary(manifests, "retention"),
            agreement=_summary(manifests, "pairs").get("agreement", {}),
            right=_summary(manifests, "calibration").get("right", {}) if job.calibration.source else {},
            charts=_charts(run_dir, job, manifests),
            samples=_samples(run_dir, job.evaluation.samples) if "evaluation" in manifests else [],
            conversations=_conversations(run_dir, 3) if "synthesis" in manifests else [],
            warnings=_warnings(manifests),
        )
    )
    return _written(run_dir, page)


def write_comparison(
    run_dir: str, comparison: Comparison, results: list[ArmResult], heldout: list[HeldoutResult]
) -> str:
    """Write the report of a comparison; its path."""
    rewards: dict[str, list[ArmResult]] = {}
    for result in results:
        rewards.setdefault(result.reward, []).append(result)
    charts = {
        reward: _compared({result.arm: result.difference for result in of_reward}, comparison, f"{reward}: gain")
        for reward, of_reward in rewards.items()
    }
    accuracies = {result.arm: result.accuracy for result in heldout}
    page = (
        _environment()
        .get_template("comparison.html.jinja")
        .render(
            comparison=comparison,
            rewards=rewards,
            charts=charts,
            heldout=heldout,
            accuracies=_compared(accuracies, comparison, "share of pairs") if heldout else None,
        )
    )
    return _written(run_dir, page)


def _written(run_dir: str, page: str) -> str:
    Folder(run_dir).write_bytes(REPORT, page.encode("utf-8", "replace"))
    return f"{run_dir.rstrip('/')}/{REPORT}"


def _compared(estimates: dict[str, Estimate], comparison: Comparison, label: str) -> Markup:
    """The arms' figures with their intervals: over the values of what varies, or one row for each arm."""
    if comparison.vary is None:
        return _rows(estimates, label)
    figure, axes = _figure(height=3.0)
    axis = axes[0][0]
    for arm in comparison.arms:
        points = [(v.value, estimates[str(v)]) for v in comparison.variants if v.arm == arm and str(v) in estimates]
        places, means = [value for value, _ in points], [estimate.mean for _, estimate in points]
        ends = [[e.mean - e.low for _, e in points], [e.high - e.mean for _, e in points]]
        axis.errorbar(places, means, yerr=ends, marker="o", markersize=4, linewidth=1.4, capsize=2, label=arm)
    axis.set_xlabel(comparison.vary.key, fontsize=8)
    axis.set_ylabel(label, fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    return _svg(figure)


def _rows(estimates: dict[str, Estimate], label: str) -> Markup:
    figure, axes = _figure(height=0.6 + 0.32 * len(estimates))
    axis = axes[0][0]
    for place, estimate in enumerate(reversed(estimates.values())):
        axis.plot([estimate.low, estimate.high], [place, place], color=AFTER, linewidth=2)
        axis.plot([estimate.mean], [place], "o", color=AFTER, markersize=5)
    axis.axvline(0, color=BEFORE, linewidth=0.8)
    axis.set_yticks(range(len(estimates)), list(reversed(estimates)))
    axis.set_ylim(-0.6, len(estimates) - 0.4)
    axis.set_xlabel(label, fontsize=8)
    return _svg(figure)


def headline(run_dir: str) -> list[str]:
    """The result of a run in a few lines of text."""
    manifests = _manifests(run_dir)
    summary, retention = _summary(manifests, "evaluation"), _summary(manifests, "retention")
    lines = []
    for reward in summary.get("rewards", []):
        rate, kind = reward["win_rate"], "optimised" if reward["weight"] else "independent"
        lines.append(
            f"win rate    {rate['mean']:.3f} (95% interval {rate['low']:.3f} to {rate['high']:.3f}) of the trained "
            f"model by {reward['reward']}, {kind}; mean {reward['start_mean']:.3f} -> {reward['trained_mean']:.3f}"
        )
    if summary.get("kl"):
        length = {side: value["mean"] for side, value in summary["length"].items()}
        stop = {side: value["mean"] for side, value in summary["stop_rate"].items()}
        lines.append(
            f"on {summary['prompts']} held-out prompts: KL {summary['kl']['mean']:.1f} nats, tokens "
            f"{length['start']:.0f} -> {length['trained']:.0f}, stop rate {stop['start']:.2f} -> {stop['trained']:.2f}"
        )
    if retention:
        factor = retention["perplexity_factor"]
        interval = f"95% interval {factor['low']:.3f} to {factor['high']:.3f}"
        lines.append(
            f"on {retention['texts']} other texts: perplexity {factor['mean']:.3f} times the start model's ({interval})"
        )
    return lines


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rdpo.evaluation"), autoescape=True, trim_blocks=True, finalize=_written_out
    )
    environment.filters["shown"] = shown
    environment.filters["clock"] = lambda seconds: f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
    return environment


def _written_out(value: Any) -> Any:
    """Whatever a template prints, fit for a page; our own drawings as they are."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def shown(text: str) -> str:
    """Model text fit for a page: control and direction characters made visible, very long text cut."""
    text = text or ""
    cut = visible(text[:SHOWN_CHARS])
    return cut if len(text) <= SHOWN_CHARS else f"{cut} … ({len(text)} characters)"


def _manifests(run_dir: str) -> dict[str, Manifest]:
    found = {name: StageFolder(run_dir, name).manifest() for name in STAGES}
    return {name: manifest for name, manifest in found.items() if manifest}


def _summary(manifests: dict[str, Manifest], stage: str) -> dict[str, Any]:
    return manifests[stage].summary if stage in manifests else {}


def _warnings(manifests: dict[str, Manifest]) -> list[str]:
    training, evaluation = _summary(manifests, "training"), _summary(manifests, "evaluation")
    found = []
    if training.get("steps") and training["last"]["logps/chosen"] < training["first"]["logps/chosen"] - 10:
        found.append(
            "The log-probs of the chosen answers fell in training; an SFT term (training.sft_coef) holds them."
        )
    length = evaluation.get("length")
    if length and length["trained"]["mean"] > 1.5 * length["start"]["mean"]:
        found.append("Answers grew by more than half; compare rewards at equal length before believing the win rate.")
    stop = evaluation.get("stop_rate")
    if stop and stop["trained"]["mean"] < stop["start"]["mean"] - 0.1:
        found.append("The trained model stops by itself less often than the start model.")
    return found


def _samples(run_dir: str, limit: int) -> list[dict[str, Any]]:
    rows = StageFolder(run_dir, "evaluation").table().sort_by("prompt_id").slice(0, limit).to_pylist()
    return [
        {
            "id": row["prompt_id"][:8],
            "prompt": text_of(row["prompt"]),
            "sides": [_side(row, "start"), _side(row, "trained")],
        }
        for row in rows
    ]


def _side(row: Row, side: str) -> dict[str, Any]:
    return {"name": side, "text": row[side], "scores": row[f"{side}_scores"] or {}, "score": row[f"{side}_score"]}


def _conversations(run_dir: str, limit: int) -> list[dict[str, Any]]:
    folder = StageFolder(run_dir, "synthesis")
    if not folder.parts():
        return []
    rows = folder.table().sort_by("prompt_id").slice(0, limit).to_pylist()
    turns = [name.removesuffix("_finish_reason") for name in rows[0] if name.endswith("_finish_reason")]
    return [
        {
            "id": row["prompt_id"][:8],
            "prompt": text_of(row["prompt"]),
            "turns": [(name, row[name]) for name in turns],
            "extra": extra_of(row),
        }
        for row in rows
    ]


def _charts(run_dir: str, job: Job, manifests: dict[str, Manifest]) -> dict[str, Markup]:
    charts = {}
    if "pairs" in manifests:
        pairs = StageFolder(run_dir, "pairs")
        gaps = pairs.table(columns=["reward_gap"])["reward_gap"].to_pylist() if pairs.parts() else []
        charts["gaps"] = _histogram({"reward gap": gaps}, "score of chosen minus score of rejected")
    if "training" in manifests:
        folder = StageFolder(run_dir, "training")
        steps = [json.loads(line) for line in folder.read_bytes(METRICS).decode().splitlines()]
        if steps:
            charts["curves"] = _curves(steps)
    if "evaluation" in manifests:
        rows = StageFolder(run_dir, "evaluation").table().to_pylist()
        for reward in job.rewards:
            before = [row["start_scores"][reward.name] for row in rows]
            after = [row["trained_scores"][reward.name] for row in rows]
            charts[f"reward/{reward.name}"] = _histogram({"start model": before, "trained model": after}, reward.name)
    return charts


def _figure(columns: int = 1, rows: int = 1, width: float = 6.4, height: float = 2.4) -> Any:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def _svg(figure: Any) -> Markup:
    """The figure as an SVG element that takes the page's text colour."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "rdpo"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :].replace("#000000", "currentColor"))


def _histogram(series: dict[str, list[float]], label: str) -> Markup:
    figure, axes = _figure()
    axis = axes[0][0]
    everything = [value for values in series.values() for value in values]
    bins = _bins(everything)
    for (name, values), colour in zip(series.items(), (BEFORE, AFTER), strict=False):
        axis.hist(values, bins=bins, alpha=0.65, color=colour, label=name)
    axis.set_xlabel(label, fontsize=8)
    axis.set_ylabel("prompts", fontsize=8)
    if len(series) > 1:
        axis.legend(fontsize=8, frameon=False)
    return _svg(figure)


def _bins(values: list[float]) -> Any:
    import numpy as np

    return np.histogram_bin_edges(values, bins=24) if values else 1


def _curves(steps: list[dict[str, float]]) -> Markup:
    figure, axes = _figure(columns=2, rows=3, width=7.2, height=1.9)
    known = {*NAMES, "grad_norm", "learning_rate"}
    for axis, (title, names) in zip(axes.flat, CURVES.items(), strict=True):
        for name, colour in zip([name for name in names if name in known], (AFTER, "#c2573a"), strict=False):
            label = name.rsplit("/", 1)[-1]
            axis.plot([step["step"] for step in steps], [step[name] for step in steps], color=colour, label=label)
        axis.set_title(title, fontsize=9)
        if len(names) > 1:
            axis.legend(fontsize=7, frameon=False)
    return _svg(figure)
