"""The learning rate over a training."""

from itertools import pairwise

import pytest

from rdpo.training.schedule import learning_rate


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(step, 20, 1.0, 0.2, "linear") for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(1 / 16)
