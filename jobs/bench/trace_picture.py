"""A picture of a run's trace, and how long each kind of span took.

    python jobs/bench/trace_picture.py RUN_DIR/logs/trace.json docs/trace.svg

A line of the picture is a process, in the order in which they began; of spans within each other the inner one is seen.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

MICRO = 1e6
LEAST_SHARE = 0.004
"""Of the whole: a shorter span would be a hair in the picture."""
PALETTE = ("#7a808a", "#3d78e0", "#c75a3b", "#3a8f5c", "#9a5bc4", "#a07a1c", "#2a8c9c", "#c4508a", "#5b6bb0", "#8a6d5a")
INCHES, LINE_INCHES = 11.0, 0.34


def spans_of(path: Path) -> tuple[list[dict], dict[int, str]]:
    """The spans of a trace, and the processes' names by their number."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    names = {one["pid"]: one["args"]["name"] for one in events if one["name"] == "process_name"}
    return [one for one in events if one["ph"] == "X"], names


def table(spans: list[dict], names: dict[int, str]) -> str:
    """Seconds of each kind of span of each kind of process: how many, their sum, and when the first began."""
    found = defaultdict(list)
    for one in spans:
        found[names[one["pid"]].rpartition(" (")[0], one["name"]].append(one)
    lines = [f"{'process':<28}{'span':<38}{'times':>6}{'seconds':>9}{'from':>8}"]
    for (process, name), some in sorted(found.items(), key=lambda item: item[1][0]["ts"]):
        seconds = sum(one["dur"] for one in some) / MICRO
        first = min(one["ts"] for one in some) / MICRO
        lines.append(f"{process:<28}{name:<38}{len(some):>6}{seconds:>9.1f}{first:>8.1f}")
    return "\n".join(lines)


def draw(spans: list[dict], names: dict[int, str], target: Path) -> None:
    """Draw a line for each process."""
    end = max(one["ts"] + one["dur"] for one in spans)
    kinds = list(dict.fromkeys(one["name"] for one in spans if one["dur"] > LEAST_SHARE * end))
    colours = {kind: PALETTE[place % len(PALETTE)] for place, kind in enumerate(kinds)}
    figure = Figure(figsize=(INCHES, 1.6 + LINE_INCHES * len(names)))
    FigureCanvasSVG(figure)
    axis = figure.add_subplot()
    axis.set_position((0.2, 0.8 / (1.6 + LINE_INCHES * len(names)), 0.78, 0.9))
    for one in sorted(spans, key=lambda one: -one["dur"]):
        if one["name"] not in colours:
            continue
        bar = (one["ts"] / MICRO, one["dur"] / MICRO)
        axis.broken_barh([bar], (one["pid"] - 0.4, 0.8), color=colours[one["name"]], linewidth=0)
        if one["dur"] > 0.05 * end:
            axis.text(bar[0] + bar[1] / 2, one["pid"], one["name"], ha="center", va="center", fontsize=6, clip_on=True)
    axis.set_yticks(list(names), [name.rpartition(" (")[0] for name in names.values()], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, end / MICRO)
    axis.set_xlabel("seconds", fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    figure.savefig(target, metadata={"Date": None, "Creator": None})


def main() -> None:
    """Print the table; draw the picture where one is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", help="an SVG file")
    options = parser.parse_args()
    spans, names = spans_of(options.trace)
    print(table(spans, names))
    if options.picture:
        draw(spans, names, options.picture)


if __name__ == "__main__":
    main()
