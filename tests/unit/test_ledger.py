"""Rows of dead engines: begun twice together, then alone, then dropped."""

from rdpo.synthesis.ledger import Ledger


def test_rows_that_end_leave_no_trace():
    ledger = Ledger()
    assert ledger.begin(["a", "b"]) == [0, 0]
    ledger.end(["a", "b"])
    assert ledger.begin(["a", "b"]) == [0, 0]


def test_a_waiting_suspect_is_not_counted_before_it_is_begun():
    ledger = Ledger()
    assert [ledger.begin(["a", "b"]) for _ in range(4)] == [[0, 0], [1, 1], [2, 2], [2, 2]]
    assert ledger.begin_alone("a") == 2
    assert ledger.begin(["a", "b"]) == [3, 2]
    assert ledger.begin_alone("a") == 3
    ledger.end(["b"])
    assert ledger.begin(["b"]) == [0]
