"""A finished stage in figures that a tracker can draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rdpo.files.manifest import Manifest

LEFT_OUT = {"step"}


def step_figures(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an optimizer step by their names under `train/`."""
    return {f"train/{name}": value for name, value in metrics.items() if name not in LEFT_OUT and value is not None}


def stage_figures(manifest: Manifest) -> dict[str, float]:
    """Rows, time and tokens of a stage, and of the evaluation every mean, by names under the stage's."""
    counts = {"seconds": manifest.seconds, "rows": manifest.rows_out, "dropped": sum(manifest.dropped.values())}
    found = {name: float(value) for name, value in counts.items() if name == "seconds" or manifest.rows_in}
    if manifest.tokens:
        found["tokens"] = float(manifest.tokens)
    if manifest.stage in ("evaluation", "retention"):
        found |= dict(_means(manifest.summary))
    return {f"{manifest.stage}/{name}": value for name, value in found.items()}


def _means(summary: Mapping[str, object], under: str = "") -> Iterator[tuple[str, float]]:
    """The figures of a summary; of an estimate its mean, of a list's members by their reward's name."""
    for name, value in summary.items():
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, int | float):
            yield f"{under}{name}", float(value)
        elif isinstance(value, dict):
            if "mean" in value:
                yield f"{under}{name}", float(value["mean"])
            else:
                yield from _means(value, f"{under}{name}/")
        elif isinstance(value, list):
            for member in value:
                if isinstance(member, dict) and "reward" in member:
                    yield from _means(member, f"{under}{member['reward']}/")
