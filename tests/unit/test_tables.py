"""Tables of text: columns that fit their cells, whatever stands in them."""

from rdpo.tracking.tables import aligned


def test_columns_are_as_wide_as_their_widest_cells():
    lines = aligned([["", "mean", "note"], ["a long name", "1.5", "x"], ["b", "-10.25", ""]], right=[1])
    assert lines == ["               mean  note", "a long name     1.5  x", "b            -10.25"]


def test_brackets_stay_and_nothing_acts_on_the_terminal():
    assert aligned([["[red]x[/red]", "\x1b[31m"], ["日本", "y"]]) == ["[red]x[/red]  \\u001b[31m", "日本          y"]


def test_a_long_line_is_not_folded():
    (line,) = aligned([["x" * 500, "y"]])
    assert len(line) == 503
