"""The trace of a run: what becomes of spans, and that there are none where nobody asked for any."""

import json

import pytest

from rdpo.cluster.traced import traced
from rdpo.tracking import trace
from rdpo.tracking.trace import Span, chrome, span, tracing


def of(name, began, seconds, process="driver", host="here", pid=1):
    return Span(name, process, host, pid, 1000.0 + began, seconds, {"rows": 3})


def drawn(spans):
    """Name, row, beginning and end in seconds of every span of a trace, and the names of its tracks."""
    events = chrome(spans)["traceEvents"]
    shown = [one for one in events if one["ph"] == "X"]
    times = [(one["name"], one["tid"], one["ts"] / 1e6, (one["ts"] + one["dur"]) / 1e6) for one in shown]
    return times, [one["args"]["name"] for one in events if one["name"] == "process_name"]


def test_a_span_stands_under_the_one_that_it_lies_in_and_beside_one_that_it_crosses():
    spans = [of("b", 2, 2), of("stage", 0, 10), of("a", 1, 2), of("later", 11, 1), of("within b", 2.5, 1)]
    times, tracks = drawn(spans)
    assert tracks == ["driver (1)"]
    rows = {name: row for name, row, _, _ in times}
    # `a` ends after `b` has begun: one row cannot show both.
    assert rows == {"stage": 0, "a": 0, "b": 1, "within b": 1, "later": 0}
    assert [(name, began, end) for name, _, began, end in times if name == "b"] == [("b", 2.0, 4.0)]


def test_every_process_has_a_track_of_its_own_in_the_order_of_their_beginning():
    spans = [of("rows", 5, 1, "synthesis", pid=7), of("run", 0, 9), of("rows", 6, 1, "synthesis", host="there", pid=7)]
    _, tracks = drawn(spans)
    assert tracks == ["driver (here 1)", "synthesis (here 7)", "synthesis (there 7)"]


def test_the_driver_writes_what_it_did_whatever_came_of_it(tmp_path):
    said = []
    with pytest.raises(KeyError), tracing(tmp_path / "logs" / "trace.json", said.append), span("stage", rows=2):
        raise KeyError
    events = json.loads((tmp_path / "logs" / "trace.json").read_text())["traceEvents"]
    assert [one["name"] for one in events if one["ph"] == "X"] == ["program starts", "stage"]
    assert events[-1]["args"] == {"rows": 2}
    assert said == [f"trace       {tmp_path / 'logs' / 'trace.json'}"]
    with span("after the trace"):
        pass
    assert not trace.is_open()


def test_nothing_is_measured_and_no_actor_is_changed_where_nobody_asked(tmp_path):
    with tracing(None, pytest.fail), span("stage"):
        assert traced(dict, "pool", {"a": 1}) == (dict, {"a": 1})
    assert not list(tmp_path.iterdir())


def test_of_too_many_spans_the_first_are_kept_and_the_others_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "MOST_SPANS", 3)
    said = []
    with tracing(tmp_path / "trace.json", said.append):
        for _ in range(5):
            with span("step"):
                pass
    assert "without 3 spans after the first 3" in said[0]


def test_a_cluster_that_is_gone_leaves_the_drivers_part_and_the_runs_own_error(tmp_path):
    class Gone:
        @property
        def found(self):
            raise ConnectionError

    said = []
    with pytest.raises(KeyError), tracing(tmp_path / "trace.json", said.append):
        trace._Here.trace.actor = Gone()
        raise KeyError
    assert "without the other processes: ConnectionError" in said[0]
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_full_disk_takes_the_trace_and_not_the_run(tmp_path):
    (tmp_path / "logs").write_text("no folder")
    said = []
    with tracing(tmp_path / "logs" / "trace.json", said.append):
        pass
    assert "not written" in said[0]
