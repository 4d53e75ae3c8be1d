"""Losses against golden values by hand, their reductions, and the optimum that the offset's sign leads to."""

import math
from dataclasses import replace

import pytest
import torch

from rdpo.config import LOSS_OPTIONS, Loss
from rdpo.training.group_losses import GROUP_LOSSES
from rdpo.training.losses import LOSSES, PairLogps, RewardTerms, policy_weight, preference_loss, reward_terms

# Two pairs: summed log-probs of policy and reference, tokens, and external scores; values by hand.
PAIRS = PairLogps(
    chosen=torch.tensor([-42.0, -80.0], dtype=torch.float64),
    rejected=torch.tensor([-55.5, -30.0], dtype=torch.float64),
    reference_chosen=torch.tensor([-44.0, -78.5], dtype=torch.float64),
    reference_rejected=torch.tensor([-53.0, -31.25], dtype=torch.float64),
    chosen_length=torch.tensor([20, 40]),
    rejected_length=torch.tensor([35, 12]),
)
GAP = torch.tensor([2.5, -0.25], dtype=torch.float64)
REST = {"offset_coef": 0.0}

GOLDEN = {
    "dpo": (REST, [0.493248946, 0.8400706677]),
    "conservative dpo": ({**REST, "label_smoothing": 0.1}, [0.538248946, 0.8125706677]),
    "robust": ({**REST, "loss": "robust", "label_smoothing": 0.1}, [0.436998946, 0.8744456677]),
    "hinge": ({**REST, "loss": "hinge"}, [0.55, 1.275]),
    "ipo, sums": ({**REST, "loss": "ipo"}, [0.25, 60.0625]),
    "ipo, means": ({**REST, "loss": "ipo", "normalization": "token_mean"}, [23.3151020408, 26.4367361111]),
    "rdpo": ({"offset_coef": 1.0}, [2.1710974512, 0.7057253035]),
    "modpo, w = 0.5": ({"beta": 0.1 / 0.5, "offset_coef": (1 - 0.5) / 0.5}, [1.7839007409, 0.8543552445]),
    "r-dpo": ({**REST, "length_coef": 0.01}, [0.5543552445, 0.6906503056]),
    "soft label": ({"reward_as": "soft_label"}, [0.527385127, 0.6854721299]),
    "geometric label": ({"reward_as": "geometric_label"}, [0.5203883335, 0.6761948157]),
    "regression": ({"loss": "regression"}, [4.2025, 0.000625]),
    "simpo": ({**REST, "loss": "simpo", "beta": 2.0, "margin": 1.0}, [2.1521361866, 0.6931471806]),
    "orpo": ({**REST, "loss": "orpo"}, [2.2045784363, 2.0451931604]),
    "sppo, hard": ({"loss": "sppo", "beta": 0.001}, [495510.25 / 2, 502753.8125 / 2]),
    "kto": ({**REST, "loss": "kto", "reference_point": 0.5}, [0.8881276378, 1.0685752132]),
    "bco": ({"loss": "bco"}, [1.1740782893, 1.5285560831]),
    "exo": ({**REST, "loss": "exo", "label_smoothing": 0.01}, [1.1307484301, 1.9377661009]),
    "apo-zero": ({"loss": "apo_zero"}, [0.8879895018, 1.0686392187]),
    "apo-down": ({"loss": "apo_down"}, [0.9391947634, 1.0308901381]),
}

NEEDED = {"exo": {"label_smoothing": 0.01}}
"""What a loss does not go without."""


def losses(gap=GAP, pairs=PAIRS, **settings):
    loss = Loss(**settings)
    return preference_loss(pairs, reward_terms(gap, loss), loss)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    settings, expected = GOLDEN[name]
    assert losses(**settings).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_odpo_takes_the_logarithm_of_the_gap():
    odpo = losses(offset_coef=0.5, offset_transform="log")
    assert odpo[0].item() == pytest.approx(0.6972281569, abs=1e-6)
    assert torch.isfinite(odpo).all()


def test_sppo_with_soft_labels():
    loss = Loss(loss="sppo", beta=0.001)
    gaps = torch.logit(torch.tensor([0.9, 0.9], dtype=torch.float64))
    soft = losses(gaps, loss="sppo", beta=0.001, reward_as="soft_label")
    win = 0.4 / loss.beta
    assert soft[0].item() == pytest.approx(0.5 * ((2 - win) ** 2 + (-2.5 + win) ** 2), rel=1e-9)


def test_delta():
    assert PAIRS.delta.tolist() == [4.5, -2.75]


@pytest.mark.parametrize(
    "settings",
    [
        {"offset_coef": 0.0},
        {"reward_as": "none"},
        {"offset_coef": 0.0, "label_smoothing": 0.0, "length_coef": 0.0, "margin": 0.0, "sft_coef": 0.0},
        {"loss": "robust", "offset_coef": 0.0},
    ],
)
def test_options_at_rest_are_dpo_bit_for_bit(settings):
    dpo = -torch.nn.functional.logsigmoid(0.1 * PAIRS.delta)
    assert torch.equal(losses(**settings), dpo)


def test_certain_labels_are_dpo():
    certain = torch.full((2,), 100.0, dtype=torch.float64)
    dpo = losses(reward_as="none")
    for use in ("soft_label", "geometric_label", "weight"):
        torch.testing.assert_close(losses(certain, reward_as=use), dpo)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_match_finite_differences(name):
    def of(chosen, rejected):
        return losses(
            pairs=replace(PAIRS, chosen=chosen, rejected=rejected),
            loss=name,
            beta=0.1,
            **NEEDED.get(name, {}),
        )

    inputs = (PAIRS.chosen.clone().requires_grad_(), PAIRS.rejected.clone().requires_grad_())
    assert torch.autograd.gradcheck(of, inputs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("sft", "apo_down")])
def test_every_loss_rewards_the_chosen_answer(name):
    """At the reference, a step along minus the gradient raises the chosen answer above the rejected one."""
    logps = [torch.tensor([-20.0], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    reference, length = torch.tensor([-20.0], dtype=torch.float64), torch.tensor([10])
    pairs = PairLogps(*logps, reference, reference, length, length)
    losses(torch.ones(1, dtype=torch.float64), pairs, loss=name, **NEEDED.get(name, {})).sum().backward()
    chosen, rejected = (side.grad.item() for side in logps)
    assert chosen < 0 < rejected


def test_apo_down_lowers_the_rejected_answer_and_at_the_reference_not_the_chosen_one():
    logps = [torch.tensor([-20.0], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    reference, length = torch.tensor([-20.0], dtype=torch.float64), torch.tensor([10])
    losses(torch.ones(1), PairLogps(*logps, reference, reference, length, length), loss="apo_down").sum().backward()
    assert logps[0].grad.item() == pytest.approx(0.0)
    assert logps[1].grad.item() > 0


def test_exo_with_certain_labels_is_refused():
    with pytest.raises(ValueError, match="with certain labels it is infinite; give label_smoothing"):
        Loss(loss="exo")


def test_supervised_fine_tuning_is_the_chosen_answers_likelihood_alone():
    level = losses(GAP, PAIRS, loss="sft")
    torch.testing.assert_close(level, -PAIRS.chosen / PAIRS.chosen_length)


def test_first_loss_is_minus_log_sigmoid_of_minus_the_offset():
    level = PairLogps(*[PAIRS.chosen, PAIRS.rejected] * 2, PAIRS.chosen_length, PAIRS.rejected_length)
    assert losses(pairs=level, offset_coef=0.0).tolist() == pytest.approx([math.log(2)] * 2, abs=1e-12)
    expected = [math.log1p(math.exp(0.7 * gap)) for gap in GAP.tolist()]
    assert losses(pairs=level, offset_coef=0.7).tolist() == pytest.approx(expected, abs=1e-12)


def test_sft_term_is_the_mean_nll_of_the_chosen_answer():
    plain, mixed = losses(**REST), losses(**REST, sft_coef=0.5)
    assert (mixed - plain).tolist() == pytest.approx([0.5 * 42 / 20, 0.5 * 80 / 40])


def test_pair_the_reward_contradicts_weighs_less():
    chosen = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    zero, length = torch.zeros(2, dtype=torch.float64), torch.ones(2)
    pairs = PairLogps(chosen, zero, zero, zero, length, length)
    losses(torch.tensor([4.0, -4.0], dtype=torch.float64), pairs).sum().backward()
    confirmed, contradicted = chosen.grad.abs().tolist()
    assert confirmed == pytest.approx(0.1 * 0.982014, abs=1e-6)
    assert contradicted == pytest.approx(0.1 * 0.017986, abs=1e-6)


def test_tables_name_the_same_losses():
    assert set(LOSSES) | set(GROUP_LOSSES) == set(LOSS_OPTIONS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge", "label_smoothing": 0.1}, "loss hinge does not take label_smoothing"),
        ({"loss": "simpo", "normalization": "token_mean"}, "loss simpo does not take normalization"),
        ({"loss": "dpo", "reference_point": 1.0}, "loss dpo does not take reference_point"),
        ({"loss": "orpo", "policy_weight": "wpo"}, "loss orpo does not take policy_weight"),
        ({"loss": "kto", "policy_weight": "wpo"}, "loss kto does not take policy_weight"),
        ({"loss": "infonca", "policy_weight": "wpo"}, "loss infonca does not take policy_weight"),
        ({"loss": "sppo", "reward_as": "offset"}, "loss sppo takes reward_as soft_label, weight or none"),
    ],
)
def test_an_option_that_a_loss_does_not_take_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Loss(**settings)


def test_wpo_weighs_a_pair_by_both_of_its_answers_and_never_above_1():
    # Three chosen answers, then three rejected ones.
    likeness = torch.tensor([-0.5, 0.25, 2.0, -1.0, -0.75, -0.5], dtype=torch.float64, requires_grad=True)
    weight = policy_weight(likeness)
    assert weight.tolist() == pytest.approx([0.2231301601, 0.6065306597, 1.0], rel=1e-9)
    assert not weight.requires_grad


def test_the_policys_weight_multiplies_the_pairs_loss_and_not_the_sft_term():
    weighed = replace(PAIRS, weight=torch.tensor([0.25, 0.5], dtype=torch.float64))
    assert losses(pairs=weighed, **REST).tolist() == pytest.approx([0.25 * 0.493248946, 0.5 * 0.8400706677], rel=1e-9)
    mixed = losses(pairs=weighed, **REST, sft_coef=0.5) - losses(pairs=weighed, **REST)
    assert mixed.tolist() == pytest.approx([0.5 * 42 / 20, 0.5 * 80 / 40])


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
        delta = ratio[:, None] - ratio[None, :]
        zero, one = torch.zeros_like(delta), torch.ones_like(delta)
        pairs = PairLogps(delta, zero, zero, zero, one, one)
        loss = (labels * preference_loss(pairs, RewardTerms(gap, one, one, one), Loss(beta=beta))).sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    wanted = torch.softmax(reference + (latent + external) / beta, 0)
    distance = 0.5 * (torch.softmax(policy, 0) - wanted).abs().sum()
    assert distance < 1e-5
