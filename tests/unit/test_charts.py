"""Charts are legible on both papers and do not grow with the rows."""

import importlib.resources
import re

import numpy as np
import pytest

from rdpo.report.charts import BINS, PALETTE, _edges, curves, histogram, scatter

STYLE = (importlib.resources.files("rdpo.report") / "templates" / "style.css").read_text(encoding="utf-8")


def luminance(colour):
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted(luminance(colour) + 0.05 for colour in (one, other))
    return high / low


def themes():
    """Colours by name, light and dark."""
    return [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", STYLE)[:2]]


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_colours_stand_out_from_the_paper(theme):
    for colour in PALETTE:
        assert contrast(colour, theme["paper"]) >= 3
    for name in ("ink", "soft", "accent", "good", "bad"):
        assert contrast(theme[name], theme["paper"]) >= 4.5 and contrast(theme[name], theme["panel"]) >= 4.5
    for name in ("added", "gone"):
        assert contrast(theme["ink"], theme[name]) >= 4.5


def test_charts_do_not_grow_with_the_rows():
    x, y = np.random.default_rng(0).normal(size=(2, 100_000))
    assert len(scatter(x, y, "x", "y", diagonal=True)) < 150_000
    assert len(curves(np.arange(100_000), {"one": x, "other": y})) < 150_000
    assert len(histogram({"before": x, "after": y}, "x", "rows")) < 20_000


def test_few_whole_numbers_have_a_bin_each():
    assert _edges(np.array([3.0, 1.0, 3.0])).tolist() == [0.5, 1.5, 2.5, 3.5]
    assert len(_edges(np.array([0.0, 0.5, 3.0]))) == BINS + 1


def test_a_chart_takes_the_text_colour_and_names_no_address():
    chart = histogram({"one": np.array([1.0, 2.0, np.inf])}, "x", "rows")
    assert "currentColor" in chart and "#000000" not in chart
    addresses = set(re.findall(r'https?://[^"]*', chart))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
