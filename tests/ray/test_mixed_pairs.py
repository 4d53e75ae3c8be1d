"""Generated and ready pairs as one source of the reference, also where there are only those of one kind."""

from types import SimpleNamespace

import pyarrow as pa
import pytest
import ray.data

from rdpo.execution.stage import Source
from rdpo.stages.reference import pairs_source

pytestmark = pytest.mark.ray


def run_with(generated, ready):
    """A run whose stages hold so many pairs."""
    tables = {
        name: pa.table(
            {"prompt_id": pa.array([f"{name}{n}" for n in range(count)], pa.string()), "heldout": [False] * count}
        )
        for name, count in (("pairs", generated), ("replay", ready))
    }
    sources = {
        name: Source(lambda table=table: ray.data.from_arrow(table), len(table), lambda table=table: table["prompt_id"])
        for name, table in tables.items()
    }
    summary = {"last": None, "heldout": 0, "generated": generated}
    return SimpleNamespace(
        job=SimpleNamespace(replay=True, seed=0),
        source=sources.__getitem__,
        require=lambda *_: SimpleNamespace(summary=summary),
        folder=lambda name: SimpleNamespace(tables=lambda columns: [tables[name]] if len(tables[name]) else []),
    )


@pytest.mark.parametrize(("generated", "ready"), [(3, 2), (3, 0), (0, 2)])
def test_pairs_of_either_kind_alone_are_read(ray_cluster, generated, ready):
    source = pairs_source(run_with(generated, ready))
    expected = [f"pairs{n}" for n in range(generated)] + [f"replay{n}" for n in range(ready)]
    assert source.count == generated + ready
    assert source.ids().to_pylist() == expected
    assert sorted(row["prompt_id"] for row in source.rows().take_all()) == sorted(expected)
