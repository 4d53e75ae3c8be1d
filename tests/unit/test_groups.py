"""Losses on groups against programs of their own, and that a group of two is a pair."""

import math

import pytest
import torch

from rdpo.config import Loss
from rdpo.training.group_losses import GROUP_LOSSES, GroupLogps, Ranks, group_loss, order_kept
from rdpo.training.losses import LOSSES, PairLogps, preference_loss, reward_terms

# Of each answer, the best first: log-probs under policy and reference, tokens, score.
GROUPS = [
    [(-42.0, -44.0, 20, 2.0), (-50.0, -49.5, 30, 1.25), (-31.0, -33.0, 18, 0.5), (-55.5, -53.0, 35, -0.5)],
    [(-80.0, -78.5, 40, 1.0), (-30.0, -31.25, 12, 1.25)],
    [(-12.5, -11.0, 9, 0.75), (-61.0, -61.5, 33, 0.75), (-20.0, -22.0, 14, 0.0)],
]
SOFT_SPPO = {"loss": "sppo", "reward_as": "soft_label"}
NEEDED = {"exo": {"label_smoothing": 0.01}, "selm": {"exploration_coef": 0.01}}
NAMED = {name: {"loss": name, **NEEDED.get(name, {})} for name in [*LOSSES, *GROUP_LOSSES]}
"""Every loss with what it does not go without."""


def batch_of(groups, dtype=torch.float64):
    """The sequences of some groups as a forward gives them, and their groups."""
    chosen, rejected = [group[0] for group in groups], [group[-1] for group in groups]
    flat = [*chosen, *rejected, *(one for group in groups for one in group[1:-1])]
    policy, reference, lengths, scores = (torch.tensor(column, dtype=dtype) for column in zip(*flat, strict=True))
    ranks = Ranks.of([len(group) - 2 for group in groups], "cpu")
    best = scores[ranks.index[:, :1]]
    return policy, lambda logps: GroupLogps(
        logps[ranks.index], reference[ranks.index], lengths[ranks.index], best - scores[ranks.index], ranks.there
    )


def losses(groups, **settings):
    policy, group_of = batch_of(groups)
    return group_loss(group_of(policy), Loss(**settings)).tolist()


def pair_of(winner, loser):
    return PairLogps(*(torch.tensor([value], dtype=torch.float64) for value in _interleaved(winner, loser)))


def _interleaved(winner, loser):
    return winner[0], loser[0], winner[1], loser[1], winner[2], loser[2]


def of_pair(winner, loser, **settings):
    loss, gap = Loss(**settings), torch.tensor([winner[3] - loser[3]], dtype=torch.float64)
    return preference_loss(pair_of(winner, loser), reward_terms(gap, loss), loss).item()


def plackett_luce(group, beta, coef):
    logits = [beta * (policy - reference) - coef * score for policy, reference, _, score in group]
    return -sum(z - math.log(sum(map(math.exp, logits[rank:]))) for rank, z in enumerate(logits))


def shares(group, temperature):
    weights = [math.exp(score / temperature) for *_, score in group]
    return [weight / sum(weights) for weight in weights]


def infonca(group, beta, temperature):
    values = [math.exp(beta * (policy - reference)) for policy, reference, *_ in group]
    return -sum(p * math.log(v / sum(values)) for p, v in zip(shares(group, temperature), values, strict=True))


def nca(group, beta, temperature):
    def log_sigmoid(value):
        return -math.log1p(math.exp(-value))

    rewards = [beta * (policy - reference) for policy, reference, *_ in group]
    return -sum(
        p * log_sigmoid(r) + log_sigmoid(-r) / len(group)
        for p, r in zip(shares(group, temperature), rewards, strict=True)
    )


def sppo(group, beta, temperature):
    total = 0.0
    for place, (policy, reference, _, score) in enumerate(group):
        others = [other[3] for number, other in enumerate(group) if number != place]
        wins = sum(1 / (1 + math.exp((other - score) / temperature)) for other in others) / len(others)
        total += (policy - reference - (wins - 0.5) / beta) ** 2
    return total / 2


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        ({"loss": "plackett_luce", "offset_coef": 0.4}, lambda group: plackett_luce(group, 0.1, 0.4)),
        ({"loss": "plackett_luce", "reward_as": "none"}, lambda group: plackett_luce(group, 0.1, 0.0)),
        ({"loss": "infonca", "reward_temperature": 0.5}, lambda group: infonca(group, 0.1, 0.5)),
        ({"loss": "nca", "beta": 0.3}, lambda group: nca(group, 0.3, 1.0)),
        (
            {"loss": "selm", "exploration_coef": 0.2, "offset_coef": 0.4},
            lambda group: (
                plackett_luce([group[0], group[-1]], 0.1, 0.4)
                + 0.2 * 0.1 * sum(policy - reference for policy, reference, *_ in group[1:-1])
            ),
        ),
        ({**SOFT_SPPO, "beta": 0.01, "reward_temperature": 2.0}, lambda group: sppo(group, 0.01, 2.0)),
    ],
)
def test_golden_values(settings, by_hand):
    assert losses(GROUPS, **settings) == pytest.approx([by_hand(group) for group in GROUPS], rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_on_pairs_is_its_mean_over_the_chosen_answer_with_each_other_one(name):
    settings = {**NAMED[name], "sft_coef": 0.25}
    expected = [sum(of_pair(group[0], one, **settings) for one in group[1:]) / (len(group) - 1) for group in GROUPS]
    assert losses(GROUPS, **settings) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", NAMED)
def test_a_group_is_the_same_whatever_stands_beside_it(name):
    alone = [losses([group], **NAMED[name])[0] for group in GROUPS]
    assert losses(GROUPS, **NAMED[name]) == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rdpo_over_an_order_of_two_is_rdpo_to_the_last_bit(dtype):
    pairs = [group[:2] for group in GROUPS]
    logps, group_of = batch_of(pairs, dtype)
    one, other = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    group = group_of(one)
    of_group = group_loss(group, Loss(loss="plackett_luce", offset_coef=0.7))

    chosen, rejected = other.chunk(2)
    references, lengths = group.reference.T, group.lengths.T
    pair = PairLogps(chosen, rejected, *references, *lengths)
    loss = Loss(offset_coef=0.7)
    of_pairs = preference_loss(pair, reward_terms(group.gaps[:, 1], loss), loss)
    assert torch.equal(of_group, of_pairs)
    of_group.sum().backward()
    of_pairs.sum().backward()
    assert torch.equal(one.grad, other.grad)


def test_a_loss_over_groups_is_refused_for_pairs_by_its_name():
    with pytest.raises(ValueError, match=r"infonca is a loss over groups: .*group_loss"):
        of_pair(*GROUPS[0][:2], loss="infonca")


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_among_groups_have_the_loss_of_pairs_to_the_last_bit(name):
    pairs = [group[:2] for group in GROUPS]
    assert losses(pairs, **NAMED[name]) == [of_pair(*pair, **NAMED[name]) for pair in pairs]


def test_infonca_of_two_is_dpo_with_soft_labels():
    pairs = [group[:2] for group in GROUPS]
    soft = [of_pair(*pair, reward_as="soft_label", reward_temperature=0.5) for pair in pairs]
    assert losses(pairs, loss="infonca", reward_temperature=0.5) == pytest.approx(soft, rel=1e-12)


@pytest.mark.parametrize("settings", [*NAMED.values(), SOFT_SPPO])
def test_gradients_match_finite_differences(settings):
    logps, group_of = batch_of(GROUPS)
    logps.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: group_loss(group_of(x), Loss(**settings)), (logps,), atol=1e-5, rtol=1e-4)


def test_an_order_that_is_far_off_has_a_finite_loss_and_gradient():
    group = [(-900.0 - 50 * place, -900.0, 20, 3.0 - place) for place in (4, 0, 2)]
    logps, group_of = batch_of([group], torch.float32)
    logps.requires_grad_()
    for name in GROUP_LOSSES:
        loss = group_loss(group_of(logps), Loss(**{**NAMED[name], "beta": 1.0})).sum()
        assert torch.isfinite(loss), name
        assert torch.isfinite(torch.autograd.grad(loss, logps)[0]).all(), name


def test_how_far_the_policy_keeps_the_order():
    _, group_of = batch_of(GROUPS)
    policy, _ = batch_of(GROUPS)
    right, tau = order_kept(group_of(policy))
    # Log-ratios 2, -0.5, 2, -2.5: of six pairs 1-2, 1-4, 2-4 and 3-4 are right, 1-3 is a tie.
    assert right.tolist()[0] == pytest.approx(4 / 6)
    assert tau.tolist()[0] == pytest.approx((4 - 1) / 6)
    # The pair stands against its scores, and the policy against the pair.
    assert (right.tolist()[1], tau.tolist()[1]) == (0.0, 1.0)
    # -1.5, 0.5, 2.0, the first two with equal scores: both pairs that differ are the wrong way round.
    assert (right.tolist()[2], tau.tolist()[2]) == (0.0, -1.0)


def test_rdpo_over_an_order_leads_to_the_optimum_of_its_derivation():
    """log pi(y) = log ref(y) + (latent + lambda r) / beta: by gradient descent over four answers, all orders drawn."""
    beta, coef = 0.5, 0.8
    latent, score = torch.tensor([1.0, 0.2, -0.5, 0.0]), torch.tensor([0.3, -0.7, 0.9, 0.1])
    reference = torch.log_softmax(torch.tensor([0.1, 0.4, -0.2, 0.0]), 0)
    orders = torch.tensor([[a, b, c, d] for a in range(4) for b in range(4) for c in range(4) for d in range(4)])
    orders = orders[[len(set(order.tolist())) == 4 for order in orders]]
    likely = torch.stack([_order_likelihood(latent, order) for order in orders])
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")
    there = torch.ones_like(orders, dtype=torch.bool)

    def closure():
        optimizer.zero_grad()
        policy = torch.log_softmax(logits, 0)
        gaps = score[orders[:, :1]] - score[orders]
        group = GroupLogps(policy[orders], reference[orders], torch.ones_like(orders), gaps, there)
        loss = (likely * group_loss(group, Loss(loss="plackett_luce", beta=beta, offset_coef=coef))).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum = torch.log_softmax(reference + (latent + coef * score) / beta, 0)
    torch.testing.assert_close(torch.log_softmax(logits, 0).detach(), optimum, atol=1e-3, rtol=0)


def _order_likelihood(latent, order):
    values = latent[order]
    return torch.exp(sum(values[rank] - torch.logsumexp(values[rank:], 0) for rank in range(len(order))))


def test_offsets_by_logarithms_are_refused_over_an_order():
    with pytest.raises(ValueError, match="adds up offsets, which logarithms do not"):
        Loss(loss="plackett_luce", offset_transform="log")
