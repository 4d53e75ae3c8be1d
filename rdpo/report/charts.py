"""Figures of a page: small SVG drawings in the page's text colour, none of which grows with the number of rows.

Series have colours that stand out from a light and from a dark page (contrast 3 or more on both).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from rdpo.evaluation.intervals import Estimate, Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

BEFORE, AFTER, OTHER = "#7a808a", "#3d78e0", "#c75a3b"
PALETTE = (AFTER, OTHER, "#3a8f5c", "#9a5bc4", "#a07a1c", "#2a8c9c", "#c4508a", BEFORE)
BINS = 24
POINTS = 400
"""More are drawn as means (curves) or as densities (scatter)."""
HEXAGONS = 28
SMALL, WIDE = (3.3, 2.0), (5.6, 3.0)
"""Width and height in inches."""
FONT_SIZE = 8.5
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def histogram(series: Mapping[str, Values], label: str, unit: str, colours: Sequence[str] = (BEFORE, AFTER)) -> Markup:
    """Distributions (n,) over common bins."""
    figure, axis = _figure()
    known = {name: values[np.isfinite(values)] for name, values in series.items() if len(values)}
    edges = _edges(np.concatenate(list(known.values())))
    for (name, values), colour in zip(known.items(), colours, strict=False):
        counts, _ = np.histogram(values, edges)
        axis.stairs(counts, edges, color=colour, alpha=0.3, fill=True)
        axis.stairs(counts, edges, color=colour, linewidth=1.2, label=name)
    _legend(axis, len(known))
    return _labelled(figure, axis, label, unit)


def curves(steps: Values, series: Mapping[str, Values], colours: Sequence[str] = (AFTER, OTHER)) -> Markup:
    """Values (n,) over steps (n,); of very many, means of neighbours in the band from the least to the greatest."""
    return lines({name: (steps, values) for name, values in series.items()}, colours)


def lines(series: Mapping[str, tuple[Values, Values]], colours: Sequence[str] = (AFTER, OTHER)) -> Markup:
    """As `curves`, of series each of which has steps (n,) of its own before its values (n,)."""
    figure, axis = _figure()
    for (name, (steps, values)), colour in zip(series.items(), colours, strict=False):
        groups = np.array_split(np.arange(len(steps)), min(len(steps), POINTS))
        places, means = _of_groups(np.mean, steps, groups), _of_groups(np.mean, values, groups)
        if len(steps) > POINTS:
            least, greatest = _of_groups(np.min, values, groups), _of_groups(np.max, values, groups)
            axis.fill_between(places, least, greatest, color=colour, alpha=0.2, linewidth=0)
        axis.plot(places, means, color=colour, linewidth=1.3, label=name, marker="o" if len(steps) == 1 else None)

    axis.locator_params(axis="x", integer=True)
    _legend(axis, len(series))
    return _labelled(figure, axis, "step", "")


def _of_groups(figure: Callable[[Values], np.float64], values: Values, groups: Sequence[NDArray[np.intp]]) -> Values:
    """One figure of each group of values."""
    return np.array([figure(values[group]) for group in groups])


def scatter(x: Values, y: Values, x_label: str, y_label: str, diagonal: bool = False) -> Markup:
    """A point for each pair of values (n,), or their density where there are very many.

    A line goes where both are the same (`diagonal`), or through zero of both.
    """
    figure, axis = _figure()
    if diagonal:
        axis.axline((0, 0), slope=1, color=BEFORE, linewidth=0.8)
        _limit(axis, x, y)
    else:
        axis.axhline(0, color=BEFORE, linewidth=0.8)
        axis.axvline(0, color=BEFORE, linewidth=0.8)
    if len(x) > POINTS:
        # A point for each would make the page grow with the rows.
        axis.hexbin(x, y, gridsize=HEXAGONS, bins="log", mincnt=1, cmap=_shades(), linewidths=0)
    else:
        axis.plot(x, y, "o", color=AFTER, markersize=3.5, alpha=0.75, markeredgewidth=0)
    return _labelled(figure, axis, x_label, y_label)


def interval_rows(estimates: Mapping[str, Estimate], label: str) -> Markup:
    """A mean with its interval for each name, one below the other."""
    figure, axis = _figure((WIDE[0], 0.6 + 0.32 * len(estimates)))
    for place, estimate in enumerate(list(estimates.values())[::-1]):
        axis.plot([estimate.low, estimate.high], [place, place], color=AFTER, linewidth=2)
        axis.plot([estimate.mean], [place], "o", color=AFTER, markersize=5)
    axis.axvline(0, color=BEFORE, linewidth=0.8)
    axis.set_yticks(range(len(estimates)), list(estimates)[::-1])
    axis.set_ylim(-0.6, len(estimates) - 0.4)
    return _labelled(figure, axis, label, "")


def interval_lines(series: Mapping[str, Mapping[float, Estimate]], x_label: str, y_label: str) -> Markup:
    """Means with their intervals over the values of a setting, a line for each name."""
    figure, axis = _figure(WIDE)
    axis.set_prop_cycle(color=PALETTE)
    for name, estimates in series.items():
        means = [estimate.mean for estimate in estimates.values()]
        below = [estimate.mean - estimate.low for estimate in estimates.values()]
        above = [estimate.high - estimate.mean for estimate in estimates.values()]
        axis.errorbar(
            list(estimates), means, yerr=[below, above], marker="o", markersize=4, linewidth=1.4, capsize=2, label=name
        )
    _legend(axis, len(series))
    return _labelled(figure, axis, x_label, y_label)


def _figure(size: tuple[float, float] = SMALL) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    # Without pyplot, which keeps every figure until it is closed and looks for a display.
    FigureCanvasSVG(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=FONT_SIZE)
    axis.locator_params(nbins=5)
    return figure, axis


def _edges(values: Values) -> Values:
    """Edges of the bins; one for each number where the values are whole and few."""
    if len(values) and np.ptp(values) < BINS and np.array_equal(values, np.round(values)):
        return np.arange(values.min() - 0.5, values.max() + 1)
    return np.histogram_bin_edges(values, bins=BINS)


def _legend(axis: Axes, entries: int) -> None:
    """Above the axes, where it covers nothing."""
    if entries > 1:
        axis.legend(
            fontsize=FONT_SIZE, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2
        )


def _limit(axis: Axes, x: Values, y: Values) -> None:
    """The same limits for both axes, so that the diagonal is one."""
    least, greatest = min(x.min(), y.min()), max(x.max(), y.max())
    room = 0.05 * (greatest - least) or 1.0
    axis.set_xlim(least - room, greatest + room)
    axis.set_ylim(least - room, greatest + room)


def _shades() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    return LinearSegmentedColormap.from_list("density", [to_rgba(AFTER, 0.25), to_rgba(AFTER, 1.0)])


def _labelled(figure: Figure, axis: Axes, x_label: str, y_label: str) -> Markup:
    """The figure as an SVG element that takes the page's text colour and font."""
    from matplotlib import rc_context

    axis.set_xlabel(x_label, fontsize=FONT_SIZE)
    axis.set_ylabel(y_label, fontsize=FONT_SIZE)
    buffer = io.StringIO()
    # Text stays text, in the page's font; the salt gives its elements the same names each time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "rdpo"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    text = buffer.getvalue()
    drawing = re.sub(r"<!--.*?-->\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    return Markup(drawing.replace("#000000", "currentColor"))
