"""Where the time of a run goes: spans of all its processes, as a Chrome trace (`rdpo run --trace`).

The driver opens a trace; processes on any node join it and send their spans to an actor beside the driver, by whose
name they know that there is one. Nothing is measured where no trace is open. https://ui.perfetto.dev shows the file,
and so does chrome://tracing; nothing of what either is given leaves the browser.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.actor import ActorHandle

FILE = "trace.json"
ACTOR = "rdpo-trace"
DRIVER = "driver"
MOST_SPANS = 200_000
"""Spans that a trace keeps; a viewer becomes slow long before, and the driver's memory is for the run."""
MICRO = 1e6


@dataclass(frozen=True)
class Span:
    """What a process did, from `began` on, in seconds since the epoch, for `seconds`."""

    name: str
    process: str
    host: str
    pid: int
    began: float
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)


class _Here:
    """What this process is called in the trace, and who takes its spans; nobody, where there is no trace.

    `trace` is the one that this process has opened, as a driver.
    """

    process = ""
    take: Callable[[Span], object] | None = None
    trace: Trace | None = None


class Spans:
    """An actor, or the driver's own list: the spans of many processes; of too many the first."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.lost = 0

    def add(self, span: Span) -> None:
        """Keep one span."""
        if len(self.spans) < MOST_SPANS:
            self.spans.append(span)
        else:
            self.lost += 1

    def found(self) -> tuple[list[Span], int]:
        """The spans, and how many there were no room for."""
        return self.spans, self.lost


@contextmanager
def span(name: str, **facts: Any) -> Iterator[None]:
    """Measure what happens within this context, if this process takes part in a trace."""
    if _Here.take is None:
        yield
        return
    began, ticks = time.time(), time.perf_counter()
    try:
        yield
    finally:
        _tell(name, began, time.perf_counter() - ticks, facts)


def _tell(name: str, began: float, seconds: float, facts: dict[str, Any]) -> None:
    take = _Here.take
    if take is not None:
        # Where the driver is gone there is nobody to tell.
        with suppress(Exception):
            take(Span(name, _Here.process, socket.gethostname(), os.getpid(), began, seconds, facts))


def join(process: str) -> None:
    """Take part in the trace of the run that this process works for, if there is one; `process` says what it does."""
    if _Here.trace or "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return
    try:
        actor = sys.modules["ray"].get_actor(ACTOR)
    except ValueError:
        return
    _Here.process, _Here.take = process, actor.add.remote
    _since_start("process starts")


def _since_start(name: str) -> None:
    """The time from the start of this process until now, imports included."""
    import psutil

    started = psutil.Process().create_time()
    _tell(name, started, time.time() - started, {})


@dataclass
class Trace:
    """The trace of this driver."""

    path: Path
    own: Spans = field(default_factory=Spans)
    actor: ActorHandle | None = None

    def gather(self) -> None:
        """Let the processes of the cluster send their spans, from now on."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self.actor is None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            self.actor = ray.remote(num_cpus=0, scheduling_strategy=here, name=ACTOR)(Spans).remote()
            # Else the first to join may be quicker than its name.
            ray.get(self.actor.found.remote())

    def write(self) -> str:
        """Write the file; where it is, and how many spans there was no room for, in words."""
        import ray

        spans, lost = self.own.found()
        missing = ""
        if self.actor is not None:
            try:
                theirs, more = ray.get(self.actor.found.remote())
                spans, lost = [*spans, *theirs], lost + more
            except Exception as error:
                # Of a run that ends with its cluster the end must be told, and the driver's part is there.
                missing = f" (without the other processes: {type(error).__name__})"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(chrome(spans)), encoding="utf-8")
        except OSError as error:
            return f"not written: {error}"
        return f"{self.path}{missing}" + (f" (without {lost} spans after the first {MOST_SPANS})" if lost else "")


@contextmanager
def tracing(path: Path | None, say: Callable[[str], None]) -> Iterator[None]:
    """Within this context the run of this driver is traced into a file, if there is to be one.

    It is written however the run ends, while the cluster is still there; `say` hears where it is.
    """
    if path is None:
        yield
        return
    trace = _Here.trace = Trace(path)
    _Here.process, _Here.take = DRIVER, trace.own.add
    _since_start("program starts")
    try:
        yield
    finally:
        _Here.process, _Here.take, _Here.trace = "", None, None
        say(f"trace       {trace.write()}")


def is_open() -> bool:
    """Whether this process is a driver that traces its run."""
    return _Here.trace is not None


def gather() -> None:
    """The cluster is there: if this driver traces, its processes may take part."""
    if _Here.trace:
        _Here.trace.gather()


def chrome(spans: Sequence[Span]) -> dict[str, Any]:
    """Spans in Chrome's trace event format: a track for each process, with rows for what it does at the same time.

    Times are microseconds from the first span on. Those that lie within another stand under it.
    """
    ordered = sorted(spans, key=lambda one: (one.began, -one.seconds))
    processes: dict[tuple[str, int, str], list[Span]] = {}
    for one in ordered:
        processes.setdefault((one.host, one.pid, one.process), []).append(one)

    events: list[dict[str, Any]] = []
    hosts = {one.host for one in ordered}
    for number, ((host, pid, process), own) in enumerate(processes.items()):
        name = f"{process} ({host} {pid})" if len(hosts) > 1 else f"{process} ({pid})"
        for what, value in (("name", {"name": name}), ("sort_index", {"sort_index": number})):
            events.append({"ph": "M", "name": f"process_{what}", "pid": number, "tid": 0, "args": value})
        for one, row in zip(own, rows_of(own), strict=True):
            place = {"ph": "X", "pid": number, "tid": row}
            time_of = {"ts": (one.began - ordered[0].began) * MICRO, "dur": one.seconds * MICRO}
            events.append({"name": one.name, "cat": process, **place, **time_of, "args": one.facts})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def rows_of(spans: Sequence[Span]) -> list[int]:
    """For each of a process's spans, which begin one after the other, the first row in which nothing crosses it."""
    rows: list[list[float]] = []
    found = []
    for one in spans:
        end = one.began + one.seconds
        number = next((number for number, open_ends in enumerate(rows) if _fits(open_ends, one.began, end)), len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(end)
        found.append(number)
    return found


def _fits(open_ends: list[float], began: float, end: float) -> bool:
    """Whether a span lies within the one that is open in a row, or behind all of them; those that ended are closed."""
    while open_ends and open_ends[-1] <= began:
        open_ends.pop()
    return not open_ends or end <= open_ends[-1]
