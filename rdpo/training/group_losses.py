"""Losses on groups: K answers to a prompt with their scores, the prompt computed once for all of them.

Answers stand in the order of preference, the chosen one first and the rejected one last. A loss on pairs (`LOSSES`) is
the mean over the pairs of the chosen answer with each other one. The losses of `GROUP_LOSSES` look at all answers at
once. On groups of two all of them are the losses on pairs.

With rho_i = log pi(y_i|x) - log ref(y_i|x), scores r_i and d_ij = beta (rho_i - rho_j) - lambda (r_i - r_j), all
written in differences, as in rDPO's derivation (`rdpo.training.losses`): what a prompt adds to all its scores is no
matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rdpo.config import Loss
from rdpo.training.losses import PairLogps, preference_loss, reward_terms


@dataclass(frozen=True)
class Ranks:
    """Where the answers of P groups stand among S sequences, by rank: (P, K), padded where a group has fewer.

    The sequences are all chosen answers, then all rejected ones, then the others, group by group in the order of
    preference. `there` says which places are no padding.
    """

    index: Tensor
    there: Tensor

    @classmethod
    def of(cls, others: Sequence[int], device: torch.device | str) -> Ranks:
        """Of groups with so many answers between the chosen and the rejected one."""
        count, most = len(others), max(others, default=0)
        rows: list[list[int]] = []
        place = 2 * count
        for number, between in enumerate(others):
            row = [number, *range(place, place + between), count + number]
            rows.append(row + [number] * (most - between))
            place += between
        sizes = torch.tensor(others, device=device) + 2
        there = torch.arange(most + 2, device=device) < sizes[:, None]
        return cls(torch.tensor(rows, device=device), there)


@dataclass(frozen=True)
class GroupLogps:
    """Summed log-probs (P, K) of groups by rank under policy and reference, in nats, and the answers' tokens (P, K).

    `gaps` (P, K): how much lower each answer's score is than the chosen one's, scaled. `there` (P, K) as in `Ranks`.
    """

    policy: Tensor
    reference: Tensor
    lengths: Tensor
    gaps: Tensor
    there: Tensor

    @cached_property
    def ratios(self) -> Tensor:
        """log pi(y|x) - log ref(y|x), (P, K)."""
        return self.policy - self.reference

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood (P,) of the chosen answers, in nats per token."""
        return -self.policy[:, 0] / self.lengths[:, 0]

    @property
    def ahead(self) -> Tensor:
        """Which pairs (P, K, K) of places are of a preferred answer and one that comes after it."""
        rank = torch.arange(self.there.shape[1], device=self.there.device)
        return self.both & (rank[:, None] < rank)

    @property
    def both(self) -> Tensor:
        """Which pairs (P, K, K) of places are of two different answers."""
        other = ~torch.eye(self.there.shape[1], dtype=torch.bool, device=self.there.device)
        return self.there[:, :, None] & self.there[:, None, :] & other

    def against_rest(self) -> tuple[PairLogps, Tensor, Tensor]:
        """The chosen answer with each other one as pairs (E,), their reward gaps (E,), and their groups (E,)."""
        others = self.there.clone()
        others[:, 0] = False
        group, rank = others.nonzero(as_tuple=True)
        first = torch.zeros_like(rank)
        columns = (self.policy, self.reference, self.lengths)
        (chosen, known, length), (rejected, other_known, other_length) = (
            [column[group, place] for column in columns] for place in (first, rank)
        )
        pairs = PairLogps(chosen, rejected, known, other_known, length, other_length)
        return pairs, self.gaps[group, rank], group


def group_loss(group: GroupLogps, loss: Loss) -> Tensor:
    """Loss (P,) of each group by the settings in `loss`."""
    whole = GROUP_LOSSES.get(loss.loss)
    if loss.loss == "sppo" and loss.reward_use == "soft_label":
        whole = sppo
    if whole:
        per_group = whole(group, loss)
        return per_group + loss.sft_coef * group.nll if loss.sft_coef else per_group

    pairs, gaps, owner = group.against_rest()
    per_pair = preference_loss(pairs, reward_terms(gaps, loss), loss)
    sums = per_pair.new_zeros(len(group.there)).index_add(0, owner, per_pair)
    return sums / (group.there.sum(1) - 1)


def margins(group: GroupLogps, loss: Loss) -> Tensor:
    """d_ij (P, K, K): how far answer i is preferred to answer j, the reward's offset subtracted."""
    moved = group.ratios[:, :, None] - group.ratios[:, None, :]
    offset = loss.offset_coef if loss.reward_use == "offset" else 0.0
    return loss.beta * moved - offset * _score_gaps(group)


def _score_gaps(group: GroupLogps) -> Tensor:
    """r_i - r_j (P, K, K)."""
    return group.gaps[:, None, :] - group.gaps[:, :, None]


def _log_first(margin: Tensor, among: Tensor) -> Tensor:
    """log of exp(z_i) / (exp(z_i) + sum over j of exp(z_j)), (P, K), of d_ij = z_i - z_j (P, K, K); 0 without any j.

    Written as log sigmoid, so that with one j it is that of a pair, to the last bit.
    """
    any_left = among.any(-1)
    # A row without any would have no gradient but one that is not a number.
    filled = torch.where(among, -margin, -torch.inf).masked_fill(~any_left[..., None], 0.0)
    return torch.where(any_left, logsigmoid(-torch.logsumexp(filled, -1)), 0.0)


def plackett_luce(group: GroupLogps, loss: Loss) -> Tensor:
    """K-wise rDPO: the Plackett-Luce likelihood of the whole order (DPO, arXiv 2305.18290, Eq. 18), rewards within.

    At each rank -log exp(z_i) / sum over j >= i of exp(z_j), with z_i = beta rho_i - lambda r_i. Derived as rDPO is:
    the latent reward of the optimum is beta rho - lambda r + const(x), put into Plackett-Luce in Bradley-Terry's place.
    """
    return -_log_first(margins(group, loss), group.ahead).sum(1)


def _shares(group: GroupLogps, loss: Loss) -> Tensor:
    """softmax(r / T) over the answers of each group, (P, K); 0 where there is none."""
    others = torch.where(group.both, -_score_gaps(group) / loss.reward_temperature, -torch.inf)
    others = others.masked_fill(~group.there[..., None], 0.0)
    return torch.where(group.there, torch.sigmoid(-torch.logsumexp(others, -1)), 0.0)


def infonca(group: GroupLogps, loss: Loss) -> Tensor:
    """InfoNCA (arXiv 2402.05369): cross-entropy of softmax(r / T) and softmax(beta rho) over the group."""
    log_policy = _log_first(loss.beta * (group.ratios[:, :, None] - group.ratios[:, None, :]), group.both)
    return -(_shares(group, loss) * log_policy).sum(1)


def nca(group: GroupLogps, loss: Loss) -> Tensor:
    """NCA (arXiv 2402.05369): -sum of p_i log sigmoid(beta rho_i) + log sigmoid(-beta rho_i) / K, p = softmax(r / T).

    It holds up the likelihood of each answer by itself, where InfoNCA knows differences alone.
    """
    rewards = loss.beta * group.ratios
    terms = _shares(group, loss) * logsigmoid(rewards) + logsigmoid(-rewards) / group.there.sum(1, keepdim=True)
    return -torch.where(group.there, terms, 0.0).sum(1)


def sppo(group: GroupLogps, loss: Loss) -> Tensor:
    """SPPO with soft labels (arXiv 2405.00675): half the sum of (rho_i - (P_i - 1/2) / beta)^2, eta = 1 / beta.

    P_i is how often answer i wins against the others, the mean of sigmoid((r_i - r_j) / T). The paper's program counts
    the answer itself among them, as half a win: that is beta K / (K - 1) in place of beta.
    """
    wins = torch.sigmoid(_score_gaps(group) / loss.reward_temperature)
    rate = torch.where(group.both, wins, 0.0).sum(-1) / (group.there.sum(1, keepdim=True) - 1)
    squares = (group.ratios - (rate - 0.5) / loss.beta).square()
    return 0.5 * torch.where(group.there, squares, 0.0).sum(1)


def selm(group: GroupLogps, loss: Loss) -> Tensor:
    """SELM (arXiv 2405.19332): DPO on the chosen and the rejected answer, plus alpha beta rho of those between them.

    These are what the reference itself would say, drawn greedily: what it says anyway becomes less likely, so that the
    next round's samples find something else. alpha is `exploration_coef`.
    """
    last = group.there.sum(1, keepdim=True) - 1
    ahead = margins(group, loss)[:, 0].gather(1, last)[:, 0]
    between = group.ahead[:, 0] & (torch.arange(group.there.shape[1], device=last.device) < last)
    greedy = torch.where(between, group.ratios, 0.0).sum(1)
    return -logsigmoid(ahead) + loss.exploration_coef * loss.beta * greedy


GROUP_LOSSES: dict[str, Callable[[GroupLogps, Loss], Tensor]] = {
    function.__name__: function for function in (plackett_luce, infonca, nca, selm)
}


def order_kept(group: GroupLogps) -> tuple[Tensor, Tensor]:
    """How far the policy agrees with the order of each group, and with its scores, (P,) each.

    The first is the share of ordered pairs that its implicit rewards put the right way round; the second Kendall's tau
    between implicit rewards and scores: agreeing pairs less contrary ones, of all whose scores differ (0 without any).
    """
    moved = (group.ratios[:, :, None] - group.ratios[:, None, :]).detach()
    ahead = group.ahead
    right = (torch.where(ahead, moved, 0.0) > 0).sum((1, 2)) / ahead.sum((1, 2))
    gaps = torch.where(ahead, _score_gaps(group), 0.0)
    differing = (gaps != 0).sum((1, 2)).clamp_min(1)
    return right, (moved.sign() * gaps.sign()).sum((1, 2)) / differing
