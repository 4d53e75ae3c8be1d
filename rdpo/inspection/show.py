"""Rows of a stage in the terminal: messages, scores, and the tokens that training sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rdpo.errors import InputError
from rdpo.execution.reader import RunReader, table_of_stage
from rdpo.inspection.token_logps import TokenLogps, TokenReader
from rdpo.modeling.chat import student_chat
from rdpo.modeling.masking import counted_ids, read_ids
from rdpo.records import DRAWN, ID_COLUMN, OTHERS, Messages, Row, said, shown

Decode = Callable[[list[int]], str]
"""The text of token ids."""

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
TOKEN_STYLES = {"prompt_ids": ("grey50", "grey70"), "chosen_ids": ("green", "bright_green")}
COMPLETION_STYLES = ("red", "bright_red")
LIKELIER, LESS_LIKELY = "green", "red"
REASONING = "_reasoning"
REASONING_STYLE, MASKED_STYLES = "not bold italic magenta", ("magenta", "bright_magenta")
"""Of what was thought before an answer, and of tokens that do not count in the loss."""
MOVED = 0.1
"""Nats from which a token's change is coloured."""


def show_rows(run_dir: str, stage: str, row_id: str | None, limit: int, dropped: bool, logps: bool = False) -> None:
    """Print rows of a stage, or of its dropped table; with `logps` also what each completion token is worth.

    Raises:
        InputError: there is no such row, or it has no tokens whose log-probs could be shown.
    """
    # Only tokens need the run's job: rows of a folder without it are shown too.
    table = table_of_stage(run_dir, stage, dropped=dropped)
    if not table.num_rows:
        raise InputError(f"{run_dir}: the {stage} stage holds no {'dropped ' if dropped else ''}rows")
    rows = table.to_pylist()
    if row_id is not None:
        rows = [row for row in rows if row[ID_COLUMN].startswith(row_id)]
        if not rows:
            raise InputError(f"{run_dir}: no row of the {stage} stage has an id that begins with {row_id}")

    if logps and "prompt_ids" not in rows[0]:
        raise InputError("--logps: only rows of the reference stage have the tokens that training sees; show those")

    console = Console()
    decode = _decoder(run_dir, stage, rows[0])
    reader = TokenReader(RunReader(run_dir)) if logps else None
    for row in rows[:limit]:
        console.print(_panel(row, decode))
        if reader and decode:
            for side, values in reader.read(row).items():
                tokens = [decode([token]) for token in counted_ids(row[f"{side}_ids"])]
                console.print(_worth(side, values, tokens))
    console.print(f"{min(limit, len(rows))} of {len(rows)} rows")


def _decoder(run_dir: str, stage: str, row: Row) -> Decode | None:
    if "prompt_ids" not in row:
        return None
    job = RunReader(run_dir).job_of(stage)
    decode: Decode = student_chat(job).tokenizer.decode
    return decode


def _panel(row: Row, decode: Decode | None) -> Panel:
    hidden = {name for name in row if name == ID_COLUMN or name.endswith(DRAWN)}
    parts = [_field(name, value, decode) for name, value in row.items() if name not in hidden and value is not None]
    return Panel(Group(*parts), title=Text(shown(row[ID_COLUMN])), title_align="left")


def _field(name: str, value: Any, decode: Decode | None) -> Text:
    text = Text(f"{name}  ", style="bold")
    if name in TOKEN_COLUMNS and decode:
        return text.append_text(_tokens(name, value, decode))
    if name.endswith(REASONING):
        return text.append(shown(value), style=REASONING_STYLE)

    if name == OTHERS:
        for answer in value:
            text.append_text(_messages(answer))
        return text
    if isinstance(value, list) and not all(isinstance(item, dict) and "role" in item for item in value):
        value = ", ".join(map(str, value))
    if isinstance(value, list):
        return text.append_text(_messages(value))

    if isinstance(value, dict):
        value = "  ".join(f"{key} {score:.3f}" for key, score in value.items() if score is not None)
    if isinstance(value, float):
        value = f"{value:.4f}"
    return text.append(shown(str(value)), style="not bold")


def _messages(messages: Messages) -> Text:
    text = Text()
    for message in messages:
        text.append(f"\n[{message['role']}] ", style="cyan").append(shown(said(message)), style="not bold")
    return text


def _tokens(name: str, ids: list[int], decode: Decode) -> Text:
    """Token texts in two alternating shades; completions in colour, and in another one where they do not count."""
    shades = TOKEN_STYLES.get(name, COMPLETION_STYLES)
    text = Text(f"{len(ids)} tokens\n", style="not bold")
    for index, token in enumerate(ids):
        shade = (shades if token >= 0 else MASKED_STYLES)[index % 2]
        text.append(shown(decode(read_ids([token]))), style=f"not bold {shade}")
    return text


def _worth(side: str, values: TokenLogps, tokens: list[str]) -> Table:
    """A line for each token of a completion that counts in the loss, and their sums."""
    columns = {"reference": values.reference}
    if values.policy:
        changes = [after - before for after, before in zip(values.policy, values.reference, strict=True)]
        columns |= {"policy": values.policy, "policy - reference": changes}

    table = Table(box=box.SIMPLE, title=f"{side}: log-probs in nats", title_justify="left", show_footer=True)
    table.add_column("position", "sum", justify="right")
    table.add_column("token")
    for name, column in columns.items():
        table.add_column(name, f"{sum(column):.3f}", justify="right")

    for index, token in enumerate(tokens):
        numbers = [column[index] for column in columns.values()]
        table.add_row(
            str(values.positions[index]),
            Text(repr(shown(token))[1:-1]),
            *(f"{number:.3f}" for number in numbers),
            style=_shade(numbers[-1]) if values.policy else None,
        )
    return table


def _shade(change: float) -> str | None:
    if abs(change) < MOVED:
        return None
    return LIKELIER if change > 0 else LESS_LIKELY
