"""Scales of reward gaps, and the warning about offsets out of reach."""

import pytest
import torch

from rdpo.config import Loss
from rdpo.training.gaps import GapScale, advice


def test_scales():
    gaps = [1.0, -3.0, 2.0]
    assert GapScale.fitted(gaps, "none")(torch.tensor([2.0])).item() == 2.0
    assert GapScale.fitted(gaps, "range01")(torch.tensor([-3.0])).item() == -1.0
    assert GapScale.fitted(gaps, "zscore").scale == pytest.approx(torch.tensor(gaps).std(correction=0).item())
    assert GapScale.fitted([0.5, 0.5], "zscore").scale == 1.0


def test_advice_names_the_unreachable_ratio():
    assert advice([2.0], GapScale(), Loss(beta=0.1)) is None
    assert "500 nats" in advice([5.0], GapScale(), Loss(beta=0.01))
    assert advice([5.0], GapScale(), Loss(beta=0.01, reward_as="weight")) is None
    assert advice([5.0], GapScale(20.0), Loss(beta=0.01)) is None
