"""Actors of pools in the trace of a run: their start, and each block of rows that they work on."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from typing import Any

import pyarrow as pa

from rdpo.tracking.trace import is_open, join, span


def traced(actor: type, process: str, arguments: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """A class to use in place of a pool's, and its arguments; the pool's own where this run is not traced."""
    if not is_open():
        return actor, arguments
    wrapper = TracedStream if inspect.isasyncgenfunction(actor.__call__) else Traced
    return wrapper, {"actor": actor, "process": process, "arguments": arguments}


class Opened:
    """The actor itself, its start measured."""

    def __init__(self, actor: type, process: str, arguments: dict[str, Any]):
        join(process)
        with span(f"{actor.__name__} starts"):
            self.actor = actor(**arguments)


class Traced(Opened):
    """An actor that works on one block at a time."""

    def __call__(self, batch: pa.Table) -> Any:
        """Its answer to a block."""
        with span("rows", rows=batch.num_rows):
            return self.actor(batch)


class TracedStream(Opened):
    """An actor that works on several blocks at a time, and yields tables."""

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Its answers to a block."""
        with span("rows", rows=batch.num_rows):
            async for table in self.actor(batch):
                yield table
