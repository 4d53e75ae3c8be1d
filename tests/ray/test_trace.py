"""Processes of the cluster send their spans to the driver that traces its run."""

import json

import pytest

from rdpo.cluster.pools import Pool
from rdpo.tracking.trace import gather, span, tracing

pytestmark = pytest.mark.ray


class Doubling:
    def __init__(self, column):
        self.column = column

    def __call__(self, batch):
        import pyarrow.compute as pc

        with span("doubled"):
            return batch.set_column(0, self.column, pc.multiply(batch[self.column], 2))


class Streaming(Doubling):
    async def __call__(self, batch):
        yield super().__call__(batch)


@pytest.mark.parametrize("actor", [Doubling, Streaming])
def test_actors_of_pools_are_in_the_trace(ray_cluster, tmp_path, actor):
    import ray.data

    pool = Pool("synthesis", "synthesis.engine", 1, 1, 0, None, block_rows=4)
    with tracing(tmp_path / "trace.json", lambda said: None):
        gather()
        rows = pool.map(ray.data.range(12, override_num_blocks=3), actor, column="id").take_all()
    assert sorted(row["id"] for row in rows) == [2 * number for number in range(12)]

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {one["pid"]: one["args"]["name"] for one in events if one["name"] == "process_name"}
    own = [one for one in events if one["ph"] == "X" and tracks[one["pid"]].startswith(f"synthesis, {actor.__name__}")]
    names = [one["name"] for one in own]
    assert names.count(f"{actor.__name__} starts") == 1
    assert names.count("rows") == names.count("doubled") == 3
    assert sum(one["args"]["rows"] for one in own if one["name"] == "rows") == 12
