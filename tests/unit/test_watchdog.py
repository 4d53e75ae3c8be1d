"""Who is named when training makes no progress."""

import sys
import threading

from rdpo.training.watchdog import PACKAGE, Beat, Pulse, whereabouts

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


def held_up(*places):
    """What is said of ranks of which none is in a collective operation, as under NCCL."""
    beats = [beat(rank, 4, place, waits=False) for rank, place in enumerate(places)]
    pulse = pulse_of(*beats)
    for one in beats:
        pulse.hear(one, 95.0)
    return pulse.held_up(101.0)


def test_ranks_that_read_from_the_gpu_at_one_place_wait_for_the_one_elsewhere():
    waiting = "metrics.py:81 (reduced)"
    found = held_up(waiting, waiting, "loop.py:120 (outcome)", waiting)
    assert found.endswith("after step 4: rank 2 is in loop.py:120 (outcome)")
    assert held_up(waiting, waiting).endswith("all ranks wait for each other")


def test_both_are_named_where_nobody_knows_who_waits():
    assert held_up("loop.py:1 (a)", "loop.py:2 (b)").endswith("rank 0 is in loop.py:1 (a); rank 1 is in loop.py:2 (b)")


def test_a_library_below_a_folder_of_our_name_is_not_this_package():
    names = {}
    exec(compile("def ours(call):\n    return call()\n", f"{PACKAGE}training/loop.py", "exec"), names)
    theirs = "import sys\n\ndef theirs():\n    return sys._getframe()\n"
    exec(compile(theirs, "/home/me/rdpo/lib/python3/site-packages/torch/nn/modules/module.py", "exec"), names)
    place, waits = whereabouts(names["ours"](names["theirs"]))
    assert (place, waits) == ("loop.py:2 (ours)", False)
