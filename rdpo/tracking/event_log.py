"""The structured log of a run, for programs that collect logs: `logs/events.jsonl`, one JSON object on a line.

Every line has `time` (UTC), `level`, `run`, `stage` (null between stages) and `event`; a `message` has its `text`, a
`dropped` row its `row` (the id) and `reason`, any other event its facts.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

FILE = "events.jsonl"


def event_line(event: str, **facts: object) -> str:
    """One event as a line of JSON, in ASCII, so that nothing in a text can act on a terminal."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return json.dumps({"event": event, "time": when, **facts})


class EventLog:
    """Appends events to a file; what a full disk does not take of them is lost, and breaks nothing."""

    def __init__(self, path: Path | None):
        self.path = path
        self.run: str | None = None
        self.stage: str | None = None

    def write(self, *events: tuple[str, dict[str, object]], level: str = "info") -> None:
        """Append events, each a name with its facts, for the present run and stage."""
        if self.path is None:
            return
        place = {"level": level, "run": self.run, "stage": self.stage}
        lines = "".join(event_line(event, **{**place, **facts}) + "\n" for event, facts in events)
        with contextlib.suppress(OSError), self.path.open("a", encoding="ascii") as file:
            file.write(lines)
