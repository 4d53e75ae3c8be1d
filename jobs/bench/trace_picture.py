"""A picture of a run's trace, and how long each kind of span took.

    python jobs/bench/trace_picture.py RUN_DIR/logs/trace.json docs/trace.svg

A line of the picture is a process, in the order in which they began; of spans within each other the
inner one is seen.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch

MICRO = 1e6
LEAST_SHARE = 0.006
"""Of the whole: a shorter span would be a hair in the picture."""
INCHES, LINE_INCHES, LEGEND_INCHES, COLUMNS = 11.0, 0.3, 0.2, 4
GAP_S = 0.2
ACTOR_STARTS = re.compile(r"^(?!Ray)[A-Z]\w+ starts$")
INNER = "rows"
"""What the driver's stages have within them, and which says less than their names."""


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


def merged(spans: list[dict]) -> dict[tuple[int, str], list[tuple[float, float]]]:
    """Spans of a process by what they are, those that overlap or follow each other as one: (begin, seconds)."""
    found: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for one in sorted(spans, key=lambda one: one["ts"]):
        kind = ACTOR_STARTS.sub("actor starts", one["name"])
        bars, begin, end = found[one["pid"], kind], one["ts"] / MICRO, (one["ts"] + one["dur"]) / MICRO
        if bars and begin < sum(bars[-1]) + GAP_S:
            before = bars.pop()
            begin, end = before[0], max(end, sum(before))
        bars.append((begin, end - begin))
    return found


def draw(spans: list[dict], names: dict[int, str], target: Path) -> None:
    """Draw a line for each process, longer spans behind shorter ones."""
    shown = [one for one in spans if not (one["name"] == INNER and names[one["pid"]].startswith("driver"))]
    end = max(one["ts"] + one["dur"] for one in spans) / MICRO
    bars = [(pid, name, bar) for (pid, name), some in merged(shown).items() for bar in some]
    bars = [one for one in bars if one[2][1] > LEAST_SHARE * end]
    kinds = list(dict.fromkeys(name for _, name, _ in sorted(bars, key=lambda one: one[2])))
    colours = {kind: matplotlib.colormaps["tab20"](place % 20) for place, kind in enumerate(kinds)}

    lines = LINE_INCHES * len(names)
    legend = LEGEND_INCHES * -(-len(kinds) // COLUMNS)
    height = 0.2 + lines + 0.55 + legend
    figure = Figure(figsize=(INCHES, height), facecolor="white")
    FigureCanvasSVG(figure)
    axis = figure.add_axes((0.16, (legend + 0.55) / height, 0.82, lines / height))
    for pid, name, bar in sorted(bars, key=lambda one: -one[2][1]):
        axis.broken_barh([bar], (pid - 0.4, 0.8), color=colours[name], linewidth=0)
    axis.set_yticks(list(names), [name.rpartition(" (")[0] for name in names.values()], fontsize=7)
    axis.set_ylim(max(names) + 0.6, min(names) - 0.6)
    axis.set_xlim(0, end)
    axis.set_xlabel("seconds", fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    marks = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
    figure.legend(handles=marks, ncols=COLUMNS, fontsize=7, loc="lower center", frameon=False)
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
