"""How long a stage will still take: told late rather than wrongly."""

import heapq
import random

import pytest

from rdpo.tracking.pace import Pace


def finished_at(blocks, at_once, latency, start):
    """When each block of work comes out of an engine that has so many under way, after its start."""
    under_way = [start + latency() for _ in range(min(at_once, blocks))]
    heapq.heapify(under_way)
    waiting = blocks - len(under_way)
    while under_way:
        now = heapq.heappop(under_way)
        yield now
        if waiting:
            waiting -= 1
            heapq.heappush(under_way, now + latency())


def told(times, units, at_once):
    """What the pace says after each block, beside how long it then took: (said, true) in seconds."""
    pace, times = Pace(at_once * units), list(times)
    total = len(times) * units
    for index, now in enumerate(times):
        pace.count(units, now)
        left = total - (index + 1) * units
        if left:
            yield pace.seconds_for(left, now), times[-1] - now


@pytest.mark.parametrize("at_once", [1, 4, 16])
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("start", [5.0, 600.0])
def test_what_is_told_is_within_a_factor_of_two(at_once, spread, start):
    draw = random.Random(f"{at_once} {spread}")
    blocks = 60 * at_once
    times = finished_at(blocks, at_once, lambda: 10 * draw.uniform(1 - spread / 2, 1 + spread / 2), start)
    found = list(told(times, 8, at_once))
    # Near the end what is left is a part of one wave, which no rate tells.
    judged = [(said, true) for said, true in found[: blocks - 4 * at_once] if said is not None]
    assert len(judged) > 0.9 * blocks - 4 * at_once
    assert all(0.5 < said / true < 2 for said, true in judged), max(judged, key=lambda pair: abs(pair[0] / pair[1] - 1))


def test_nothing_is_told_before_there_is_anything_to_tell():
    # An engine takes minutes to start, and then the first wave is out at once.
    pace = Pace(at_once=128)
    assert pace.seconds_for(100, 200.0) is None
    for step in range(16):
        pace.count(8, 230.0 + 0.01 * step)
        assert pace.seconds_for(100, 230.2) is None
    # Its second wave, thirty seconds later: 128 rows in those.
    for step in range(16):
        pace.count(8, 260.0 + 0.01 * step)
    assert pace.seconds_for(256, 260.15) == pytest.approx(60.0, rel=0.02)


def test_the_first_step_which_compiles_and_fills_caches_is_no_measure():
    pace = Pace()
    pace.count(1, 67.0)
    assert pace.seconds_for(10, 67.0) is None
    pace.count(1, 78.0)
    assert pace.seconds_for(9, 78.0) == pytest.approx(99.0)


def test_rows_of_an_interrupted_run_are_no_pace_of_this_one(tmp_path):
    import io

    from rdpo.tracking.console import Console

    with Console(io.StringIO(), tmp_path / "run.log").stage("synthesis", 1000) as meter:
        meter.begin(done=900, at_once=16)
        assert "left" not in meter.line() and "900/1000" in meter.line()
        meter.advance(16)
        assert "left" not in meter.line()
