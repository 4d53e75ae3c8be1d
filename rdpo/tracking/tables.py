"""Tables for a terminal, as lines of text: every column is as wide as its widest cell."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rdpo.records import visible

WIDEST = 10_000
"""Characters of a line. Lines are never folded: where they go to may be a file, or wider than this terminal."""
GAP = 2


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """A table as lines of text.

    Args:
        rows: its cells, row by row, as many in each; a heading is a row like the others.
        right: places of the columns that are flush right, as numbers are.
    """
    table = Table.grid(padding=(0, GAP, 0, 0))
    for place in range(len(rows[0])):
        table.add_column(justify="right" if place in right else "left", no_wrap=True)
    for cells in rows:
        # As `Text`, for brackets in a plain string would be taken for markup.
        table.add_row(*(Text(visible(cell)) for cell in cells))

    console = Console(file=io.StringIO(), width=WIDEST, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]
