"""The picture of a trace: what overlaps is one bar, and every process is a line of it."""

import json
import runpy
from pathlib import Path

PICTURE = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "bench" / "trace_picture.py"))
SECOND = 1_000_000


def span(pid, name, begin, seconds):
    return {"ph": "X", "pid": pid, "name": name, "ts": begin * SECOND, "dur": seconds * SECOND}


SPANS = [
    span(1, "synthesis", 0, 60),
    span(1, "rows", 1, 58),
    span(2, "Teacher starts", 2, 10),
    span(2, "rows", 12, 20),
    span(2, "rows", 13, 30),
    span(2, "rows", 43.1, 5),
    span(2, "rows", 55, 2),
    span(1, "Ray starts", 60, 3),
]


def test_spans_that_overlap_or_follow_are_one_bar():
    bars = PICTURE["merged"](SPANS)
    assert bars[2, "rows"] == [(12.0, 36.1), (55.0, 2.0)]
    assert bars[2, "actor starts"] == [(2.0, 10.0)]
    assert bars[1, "Ray starts"] == [(60.0, 3.0)]


def test_the_picture_names_every_process_and_what_it_did(tmp_path):
    names = {1: "driver (10)", 2: "synthesis, Teacher (11)"}
    events = [
        *SPANS,
        *({"ph": "M", "name": "process_name", "pid": n, "args": {"name": name}} for n, name in names.items()),
    ]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    PICTURE["draw"](*PICTURE["spans_of"](trace), tmp_path / "trace.svg")
    drawn = (tmp_path / "trace.svg").read_text()
    for words in ("<!-- driver -->", "<!-- synthesis, Teacher -->", "<!-- actor starts -->", "<!-- rows -->"):
        assert words in drawn
