"""The loss against hand-computed values, its reductions, and the optimum its sign leads to."""

import math
from itertools import pairwise

import pytest
import torch

from rdpo.training.losses import Offset, learning_rate, log_ratio_gap, preference_loss

# Two pairs: summed log-probs of policy and reference, and external scores; values by hand (6 digits).
POLICY = torch.tensor([[-42.0, -80.0], [-55.5, -30.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-44.0, -78.5], [-53.0, -31.25]], dtype=torch.float64)
GAP = torch.tensor([2.5, -0.25], dtype=torch.float64)


def delta():
    return log_ratio_gap(POLICY[0], POLICY[1], REFERENCE[0], REFERENCE[1])


def test_log_ratio_gap():
    assert delta().tolist() == [4.5, -2.75]


@pytest.mark.parametrize(
    ("coef", "smoothing", "expected"),
    [
        (0.0, 0.0, [0.493248946, 0.8400706677]),
        (0.0, 0.1, [0.538248946, 0.8125706677]),
        (1.0, 0.0, [2.1710974512, 0.7057253035]),
        (0.5, 0.0, [-math.log(1 / (1 + math.exp(0.8))), -math.log(1 / (1 + math.exp(0.15)))]),
    ],
)
def test_golden_values(coef, smoothing, expected):
    loss = preference_loss(delta(), coef * GAP, beta=0.1, label_smoothing=smoothing)
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)


def test_first_loss_is_ln2_without_offset():
    zero = torch.zeros(3, dtype=torch.float64)
    assert preference_loss(zero, zero, 0.1).tolist() == pytest.approx([math.log(2)] * 3, abs=1e-12)


def test_zero_offset_is_dpo_bit_for_bit():
    dpo = -torch.nn.functional.logsigmoid(0.1 * delta())
    assert torch.equal(preference_loss(delta(), 0.0 * GAP, 0.1), dpo)


def test_pair_the_reward_contradicts_weighs_less():
    leaning = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    preference_loss(leaning, torch.tensor([4.0, -4.0], dtype=torch.float64), 0.1).sum().backward()
    confirmed, contradicted = leaning.grad.abs().tolist()
    assert confirmed == pytest.approx(0.1 * 0.982014, abs=1e-6)
    assert contradicted == pytest.approx(0.1 * 0.017986, abs=1e-6)


def test_optimum_follows_latent_plus_external_reward():
    """With Bradley-Terry labels from a latent reward r, the exact optimum is ref * exp((r + e) / beta)."""
    torch.manual_seed(0)
    beta, answers = 0.5, 5
    reference = torch.log_softmax(torch.randn(answers, dtype=torch.float64), 0)
    latent, external = torch.randn(2, answers, dtype=torch.float64)
    labels = torch.sigmoid(latent[:, None] - latent[None, :])
    gap = external[:, None] - external[None, :]
    policy = reference.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([policy], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        ratio = torch.log_softmax(policy, 0) - reference
        loss = (labels * preference_loss(ratio[:, None] - ratio[None, :], gap, beta)).sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    wanted = torch.softmax(reference + (latent + external) / beta, 0)
    distance = 0.5 * (torch.softmax(policy, 0) - wanted).abs().sum()
    assert distance < 1e-5


def test_offset_norms():
    gaps = [1.0, -3.0, 2.0]
    assert Offset.fitted(gaps, 0.5, "none")(torch.tensor([2.0])).item() == 1.0
    assert Offset.fitted(gaps, 1.0, "range01")(torch.tensor([-3.0])).item() == -1.0
    assert Offset.fitted(gaps, 1.0, "zscore").scale == pytest.approx(torch.tensor(gaps).std(correction=0).item())


def test_advice_names_the_unreachable_ratio():
    assert Offset(1.0, 1.0).advice([2.0], beta=0.1) is None
    assert "500 nats" in Offset(1.0, 1.0).advice([5.0], beta=0.01)


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(step, 20, 1.0, 0.2, "linear") for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(1 / 16)
