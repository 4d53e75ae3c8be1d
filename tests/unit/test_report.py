"""The report as a page: hostile text stays text."""

import pytest
from jinja2 import Environment

from rdpo.evaluation.report import SHOWN_CHARS, _environment, shown

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">\u202egnp.exe\x00\x1b[31m'


def rendered(text):
    environment: Environment = _environment()
    return environment.from_string('<div class="text">{{ text|shown }}</div>').render(text=text)


def test_model_text_is_escaped_and_control_characters_are_visible():
    page = rendered(HOSTILE)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert "\\u202e" in page and "\u202e" not in page
    assert "\x00" not in page and "\x1b" not in page


def test_a_megabyte_is_cut_and_says_so():
    page = rendered("x" * 1_000_000)
    assert len(page) < SHOWN_CHARS + 200
    assert "(1000000 characters)" in page


@pytest.mark.parametrize("text", ["", None])
def test_no_text_is_no_error(text):
    assert shown(text) == ""


def test_line_breaks_and_tabs_stay():
    assert shown("a\n\tb") == "a\n\tb"
