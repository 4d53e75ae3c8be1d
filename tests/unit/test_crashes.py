"""Rows of dead engines: begun twice together, then alone, then dropped."""

from rdpo.synthesis.crashes import CrashCounts


def test_rows_that_end_leave_no_trace():
    crash_counts = CrashCounts()
    assert crash_counts.begin(["a", "b"]) == [0, 0]
    crash_counts.end(["a", "b"])
    assert crash_counts.begin(["a", "b"]) == [0, 0]


def test_a_waiting_suspect_is_not_counted_before_it_is_begun():
    crash_counts = CrashCounts()
    assert [crash_counts.begin(["a", "b"]) for _ in range(4)] == [[0, 0], [1, 1], [2, 2], [2, 2]]
    assert crash_counts.begin_alone("a") == 2
    assert crash_counts.begin(["a", "b"]) == [3, 2]
    assert crash_counts.begin_alone("a") == 3
    crash_counts.end(["b"])
    assert crash_counts.begin(["b"]) == [0]
