"""Pools of actors: they grow under load and shrink after it, and a row that kills its actor takes no other with it."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from rdpo.cluster.pools import adapt_pools, engine_pool
from rdpo.config import Engine
from rdpo.records import table_of
from rdpo.synthesis.crashes import CrashGuard, open_crash_counts

pytestmark = pytest.mark.ray

WAIT_S = 300


class Echo:
    """What an engine's actor is to Ray, with a diary in place of an engine."""

    def __init__(self, diary, crash_counts):
        self.diary, self.crash_guard = Path(diary), CrashGuard(crash_counts)
        self.note("alive")

    def note(self, name):
        with open(self.diary / name, "a") as notes:
            notes.write(f"{os.getpid()}\n")

    def noted(self, name):
        return [int(line) for line in (self.diary / name).read_text().split()]

    async def __call__(self, batch):
        yield table_of(await self.crash_guard.carry(batch.to_pylist(), self.work))

    async def work(self, row):
        self.note(row["prompt_id"])
        if row["text"] == "poison":
            await asyncio.sleep(0.3)
            os._exit(1)
        if row["text"] == "crowd":
            await asyncio.to_thread(self.wait_for, self.has_company, "the pool did not grow")
        if row["text"] == "straggler":
            await asyncio.to_thread(self.wait_for, self.is_alone, "the pool did not shrink")
            self.note("outlived")
        await asyncio.sleep(0.2)
        return {**row, "echo": row["text"]}

    def others(self):
        return set(self.noted("alive")) - {os.getpid()}

    def has_company(self):
        return bool(self.others())

    def is_alone(self):
        return not any(is_alive(pid) for pid in self.others())

    def wait_for(self, reached, failure):
        deadline = time.monotonic() + WAIT_S
        while not reached():
            assert time.monotonic() < deadline, failure
            time.sleep(0.2)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def echoed(diary, texts, **engine):
    import ray.data

    rows = [{"prompt_id": f"{index:03d}", "text": text} for index, text in enumerate(texts)]
    settings = Engine(cpus=1, batches_in_flight=2, **engine)
    pool = engine_pool("synthesis", "synthesis.engine", settings, None)
    echoes = pool.map(ray.data.from_items(rows), Echo, diary=str(diary), crash_counts=open_crash_counts())
    return echoes.take_all()


def test_a_pool_grows_to_its_largest_size_and_falls_back(ray_cluster, tmp_path):
    adapt_pools()
    texts = ["crowd"] * 59 + ["straggler"]
    done = echoed(tmp_path, texts, concurrency=(1, 2), batch_rows=2)
    assert len(done) == len(texts)
    assert len(set((tmp_path / "alive").read_text().split())) == 2
    assert len((tmp_path / "outlived").read_text().split()) == 1


def test_a_row_that_kills_its_engine_is_dropped_and_no_other(ray_cluster, tmp_path):
    texts = [f"plain {index}" for index in range(12)]
    texts[5] = "poison"
    done = {row["prompt_id"]: row for row in echoed(tmp_path, texts, batch_rows=4)}
    assert len(done) == len(texts)
    assert done.pop("005")["dropped"] == "its engine died 3 times, the last time with this row alone"
    assert all(row["echo"].startswith("plain") and row["dropped"] is None for row in done.values())
    assert len((tmp_path / "005").read_text().split()) == 3
