"""How long work will still take, told once there is something to tell it by."""

from __future__ import annotations

from collections import deque

WAVES = 2


class Pace:
    """The rate at which units come out of work that has several under way at the same time.

    What comes before the first unit (processes that start, models that are loaded) is no part of the rate. The first
    `at_once` units were begun together and come out together, in hardly any time: they say nothing of it either.
    So there is no rate before twice as many are done, and it is then that of the later half.
    """

    def __init__(self, at_once: int = 1):
        self.at_once = max(1, at_once)
        self._done = 0
        self._marks: deque[tuple[float, int]] = deque()

    def count(self, units: int, now: float) -> None:
        """Some more units are done, at a time in seconds."""
        self._done += units
        self._marks.append((now, self._done))
        # The rate is taken from the last mark of the earlier half on, and never from within the first wave.
        while len(self._marks) > 1 and self._marks[1][1] <= max(self.at_once, self._done // 2):
            self._marks.popleft()

    def seconds_for(self, units: int, now: float) -> float | None:
        """How many seconds so many more units will take; None while nothing tells."""
        if self._done < WAVES * self.at_once or not self._marks:
            return None
        since, before = self._marks[0]
        if self._done == before or now <= since:
            return None
        return (now - since) / (self._done - before) * units
