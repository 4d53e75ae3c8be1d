"""Rows that crash their engine are found out and dropped.

A dead engine takes its process with it, and Ray gives the rows that it was working on to another one. Without a
count, a row that kills every engine would do so for ever. The rows of a dead engine are begun once more together;
after a second death each of them is begun alone, so that the third death names the one that caused it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from rdpo.records import ID_COLUMN, Row, drop

if TYPE_CHECKING:
    from ray.actor import ActorHandle

TOGETHER = 2
ALONE = TOGETHER + 1


class CrashCounts:
    """How often each row has been begun and not ended; a Ray actor, one for each pool of engines."""

    def __init__(self) -> None:
        self.begun: dict[str, int] = {}

    def begin(self, ids: list[str]) -> list[int]:
        """Count a beginning of each row, but for those that must be begun alone; how many ended in death before."""
        before = [self.begun.get(name, 0) for name in ids]
        self.begun.update({name: count + 1 for name, count in zip(ids, before, strict=True) if count < TOGETHER})
        return before

    def begin_alone(self, name: str) -> int:
        """Count a beginning of one row; how many ended in death before."""
        self.begun[name] = self.begun.get(name, 0) + 1
        return self.begun[name] - 1

    def end(self, ids: list[str]) -> None:
        """Forget rows that are done."""
        for name in ids:
            self.begun.pop(name, None)


def open_crash_counts() -> ActorHandle:
    """The counts of one pool, which live as long as their handle is held; where they are lost, counting begins anew."""
    import ray

    return ray.remote(CrashCounts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()


def _id(row: Row) -> str:
    return str(row[ID_COLUMN])


class CrashGuard:
    """Works on rows, all at the same time, and counts each beginning and end, so that crashes are known."""

    def __init__(self, crash_counts: ActorHandle):
        self.crash_counts = crash_counts
        # One suspect at a time, so that a death names the row.
        self.alone = asyncio.Lock()

    async def carry(
        self, rows: list[Row], work: Callable[[Row], Awaitable[Row]], name: Callable[[Row], str] = _id
    ) -> list[Row]:
        """The worked rows, in order; one whose engine died each time is dropped. `name` tells rows apart."""
        names = [name(row) for row in rows]
        # Before any work: what is not counted when the engine dies is not known to have been at work.
        deaths = await self.crash_counts.begin.remote(names)
        begun = [
            work(row) if count < TOGETHER else self._carry_alone(row, known_as, work)
            for row, known_as, count in zip(rows, names, deaths, strict=True)
        ]
        done = list(await asyncio.gather(*begun))
        await self.crash_counts.end.remote(names)
        return done

    async def _carry_alone(self, row: Row, name: str, work: Callable[[Row], Awaitable[Row]]) -> Row:
        async with self.alone:
            deaths = await self.crash_counts.begin_alone.remote(name)
            if deaths >= ALONE:
                return drop(row, f"its engine died {deaths} times, the last time with this row alone")
            done = await work(row)
            # Its block may yet die of another row, and then this one is no suspect.
            await self.crash_counts.end.remote([name])
            return done
