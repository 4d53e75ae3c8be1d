"""Finding the worker that holds up all others.

Each worker says now and then which step it is in and where its training loop is. When no step has been finished for too
long, all wait for the one that is elsewhere, or that says nothing any more. With gloo they wait inside a collective
operation. With NCCL such an operation returns at once, and they wait where they next read a number from the GPU
(`.item()`, `.tolist()`): then the place where most of them are counts as waiting.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
WAITING_IN = ("torch/distributed", "deepspeed/comm")
BEATS = 10
"""How often a worker speaks within the time after which it counts as hanging."""
HANGS = 75
"""Exit code of a worker that ends itself."""


@dataclass(frozen=True)
class Beat:
    """What one worker said of itself: its optimizer steps so far, where it is, and whether it waits for others."""

    rank: int
    steps: int
    place: str
    waits: bool


@dataclass
class Pulse:
    """The last beat of every worker, and since when all of them have made no progress.

    A beat counts as old after `limit` seconds; times are the receiver's.
    """

    limit: float
    workers: int = 0
    beats: dict[int, tuple[float, Beat]] = field(default_factory=dict)
    moved: float = 0.0

    def hear(self, beat: Beat, now: float) -> str | None:
        """Take a beat; what holds training up, if something does."""
        before = self.beats.get(beat.rank)
        if before is None or before[1].steps < beat.steps:
            self.moved = now
        self.beats[beat.rank] = (now, beat)
        return self.held_up(now) if now - self.moved > self.limit else None

    def held_up(self, now: float) -> str:
        """The workers that the others wait for, and where they are."""
        never = [rank for rank in range(self.workers) if rank not in self.beats]
        no_more = [rank for rank, (last, _) in self.beats.items() if now - last > self.limit / 2]
        silent = sorted([*never, *no_more])
        busy = _elsewhere([beat for _, beat in self.beats.values() if beat.rank not in silent])

        steps = max(beat.steps for _, beat in self.beats.values())
        reasons = [f"rank {rank} says nothing any more" for rank in silent]
        reasons += [f"rank {beat.rank} is in {beat.place}" for beat in sorted(busy, key=lambda beat: beat.rank)]
        who = "; ".join(reasons) or "all ranks wait for each other"
        return f"no optimizer step for {now - self.moved:.0f} s after step {steps}: {who}"


def _elsewhere(beats: list[Beat]) -> list[Beat]:
    """The workers that do not wait for others, of those that still speak.

    Where none is in a collective operation, those at the most common place wait; none does if two places are equally
    common, for then nobody knows who waits for whom.
    """
    busy = [beat for beat in beats if not beat.waits]
    if len(busy) < len(beats):
        return busy

    places = Counter(beat.place for beat in busy).most_common(2)
    if len(places) == 2 and places[0][1] == places[1][1]:
        return busy
    return [beat for beat in busy if beat.place != places[0][0]]


class Watchdog:
    """Says where this worker's training loop is, and ends the process when training hangs, so that it is repaired."""

    def __init__(self, rank: int, limit: float, say: Callable[[Beat], str | None]):
        self.rank, self.say, self.pause = rank, say, limit / BEATS
        self.steps = 0
        # Ray Train runs the loop in a thread of its own.
        self.loop = threading.get_ident()
        self.ended = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()

    def _watch(self) -> None:
        while not self.ended.wait(self.pause):
            place, waits = whereabouts(sys._current_frames().get(self.loop))
            if self.say(Beat(self.rank, self.steps, place, waits)):
                # `sys.exit` would end this thread alone, and no exception reaches one that hangs inside a library.
                os._exit(HANGS)


def whereabouts(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost place of a thread in this package, and whether it is in a collective operation."""
    if frame is None:
        return "no Python code", False
    stack = traceback.extract_stack(frame)
    own = [entry for entry in stack if entry.filename.startswith(PACKAGE)] or list(stack)
    waits = any(_is_collective(entry.filename) for entry in stack[-6:])
    last = own[-1]
    return f"{os.path.basename(last.filename)}:{last.lineno} ({last.name})", waits


def _is_collective(filename: str) -> bool:
    return any(place in filename for place in WAITING_IN)
