"""Who is named when training makes no progress."""

import sys
import threading

from rdpo.training.watchdog import Beat, Pulse, whereabouts

LIMIT = 100.0


def beat(rank, steps, place="loop.py:1 (step)", waits=True):
    return Beat(rank, steps, place, waits)


def pulse_of(*beats, at=0.0):
    pulse = Pulse(LIMIT)
    for one in beats:
        assert pulse.hear(one, at) is None
    return pulse


def test_progress_of_one_worker_is_progress():
    pulse = pulse_of(beat(0, 1), beat(1, 1))
    assert pulse.hear(beat(0, 2), 90.0) is None
    assert pulse.hear(beat(1, 1), 150.0) is None


def test_the_worker_that_the_others_wait_for_is_named_with_its_place():
    pulse = pulse_of(beat(0, 7), beat(1, 7), beat(2, 7))
    pulse.hear(beat(0, 7), 95.0)
    pulse.hear(beat(1, 7, "loop.py:9 (outcome)", waits=False), 95.0)
    found = pulse.hear(beat(2, 7), 101.0)
    assert found == "no optimizer step for 101 s after step 7: rank 1 is in loop.py:9 (outcome)"


def test_a_worker_that_says_nothing_is_named_first():
    pulse = pulse_of(beat(0, 3), beat(1, 3))
    pulse.hear(beat(1, 3), 95.0)
    found = pulse.hear(beat(1, 3), 120.0)
    assert found.endswith("after step 3: rank 0 says nothing any more")


def test_a_worker_that_has_never_spoken_is_named():
    pulse = Pulse(LIMIT, workers=2)
    assert pulse.hear(beat(1, 3), 0.0) is None
    assert pulse.hear(beat(1, 3), 101.0).endswith("rank 0 says nothing any more")


def test_nobody_is_blamed_where_all_wait():
    pulse = pulse_of(beat(0, 3), beat(1, 3))
    pulse.hear(beat(0, 3), 95.0)
    assert pulse.hear(beat(1, 3), 101.0).endswith("all ranks wait for each other")


def test_whereabouts_of_a_thread():
    here = threading.get_ident()
    place, waits = whereabouts(sys._current_frames()[here])
    assert not waits
    assert "test_whereabouts_of_a_thread" in place
