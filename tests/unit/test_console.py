"""What the consoles write, for people and for machines."""

import io
import json

import pyarrow as pa

from rdpo.config import Tracking
from rdpo.execution.pipeline import run_stages
from rdpo.execution.run import Run
from rdpo.execution.stage import Stage
from rdpo.tracking.console import Console, JsonConsole, QuietConsole


def run_of_one_stage(folder, console, lost=("b",)):
    """A run whose only stage stores a row and drops those named; run twice."""

    def execute(run, folder, meter):
        rows = pa.table({"prompt_id": ["a", *lost], "dropped": [None, *["too \x1b[31mlong"] * len(lost)]})
        meter.advance(folder.write_parts(rows, "prompt_id").rows)
        run.console.warn("mind \u202ethis")
        return {}

    stage = Stage("prompts", (), lambda job: {}, execute)
    for _ in range(2):
        run = Run(Job, str(folder), console, lambda *_: False)
        run_stages(run, [stage])
    console.conclude("win rate 0.9")
    console.tell("result", model="m")


class Job:
    """As much of a job as the pipeline looks at."""

    name, seed, trusted_code, tracking = "job", 0, (), Tracking()

    @staticmethod
    def model_dump(**_):
        return {"name": "job"}


def written(folder, console_class, **rows):
    screen = io.StringIO()
    run_of_one_stage(folder / "run", console_class(screen, folder / "run.log"), **rows)
    return screen.getvalue(), (folder / "run.log").read_text()


def test_a_quiet_run_says_warnings_and_what_came_of_it(tmp_path):
    screen, log = written(tmp_path, QuietConsole)
    assert screen == "warning: mind \\u202ethis\nwin rate 0.9\n"
    assert "prompts" in log and "dropped 1" in log


def test_a_run_for_machines_writes_an_event_a_line(tmp_path):
    screen, log = written(tmp_path, JsonConsole)
    events = [json.loads(line) for line in screen.splitlines()]
    assert [event["event"] for event in events] == ["stage_begin", "warning", "stage_end", "stage_end", "result"]
    _, warning, made, kept, _ = events
    assert warning["text"] == "mind \u202ethis"
    assert screen.isascii() and "\x1b" not in screen
    assert (made["stage"], made["state"], kept["state"]) == ("prompts", "made", "up to date")
    assert (made["rows_in"], made["rows_out"], list(made["dropped"].values())) == (2, 1, [1])
    assert "win rate 0.9" in log


def test_a_person_sees_each_line_and_no_event(tmp_path):
    screen, _ = written(tmp_path, Console)
    assert "{" not in screen
    assert "            warning: mind" in screen and "prompts     up to date" in screen


def test_a_dropped_row_of_a_file_is_named_by_its_line(tmp_path):
    for name, lost, shown in (
        ("one", ["p.jsonl:4"], "long (p.jsonl:4)"),
        ("two", ["p.jsonl:4", "p.jsonl:9"], "long (the first is p.jsonl:4)"),
        ("ids", ["5f2e", "9a01"], "long"),
    ):
        (tmp_path / name).mkdir()
        screen, _ = written(tmp_path / name, Console, lost=lost)
        assert f"dropped {len(lost)}: too \\u001b[31m{shown}\n" in screen


def test_every_line_of_the_structured_log_says_where_it_belongs(tmp_path):
    written(tmp_path, Console)
    lines = (tmp_path / "events.jsonl").read_text()
    events = [json.loads(line) for line in lines.splitlines()]
    assert lines.isascii()
    assert all({"time", "level", "run", "stage", "event"} <= set(event) and event["run"] == "job" for event in events)
    (dropped,) = [event for event in events if event["event"] == "dropped"]
    assert (dropped["stage"], dropped["row"], dropped["reason"]) == ("prompts", "b", "too \x1b[31mlong")
    (warning,) = [event for event in events if event["level"] == "warning"]
    assert (warning["event"], warning["stage"], warning["text"]) == ("message", "prompts", "mind \u202ethis")
    assert [event["state"] for event in events if event["event"] == "stage_end"] == ["made", "up to date"]


def test_all_consoles_write_the_same_structured_log(tmp_path):
    logs = []
    for console_class in (Console, QuietConsole, JsonConsole):
        (tmp_path / console_class.__name__).mkdir()
        written(tmp_path / console_class.__name__, console_class)
        lines = (tmp_path / console_class.__name__ / "events.jsonl").read_text().splitlines()
        logs.append([(event["event"], event["level"], event["stage"]) for event in map(json.loads, lines)])
    assert logs[0] == logs[1] == logs[2]
