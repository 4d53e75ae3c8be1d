"""Preference losses as pure functions of (P,) log-probs that compose: score, offset, label, shape, weight.

    L_i = v_i * w_i * phi(beta * S_i - m_i; q_i) [+ sft_coef * NLL of the chosen answer, per token]

S is how far the policy prefers chosen y_w to rejected y_l, m an offset, q the probability that the
label is right, phi the shape. A loss's name picks S and phi (`LOSSES`); how the external reward gap
`e = r(x, y_w) - r(x, y_l)` enters is chosen apart from it (`reward_as`), so that every loss is also a
refined one, and v is what the policy itself makes of the pair (`policy_weight`). With all options at rest
each loss is the one of its paper.

The refined DPO loss of arXiv 2402.08005 is `dpo` with m = lambda * e. Its form is derived, not copied:
the paper's training code was never released. Maximising E[r_latent + lambda * r] - beta * KL(pi || ref)
gives r_latent = beta * log(pi / ref) - lambda * r + const(x); put into Bradley-Terry, that is
-log sigmoid(beta * delta - lambda * e). With the MINUS sign the optimum is
ref * exp((r_latent + lambda * r) / beta), and a pair that the reward contradicts weighs less; a plus
sign would train against the reward. It is MODPO (arXiv 2310.03708; weights (w, 1 - w) are beta / w
and lambda = (1 - w) / w), and ODPO (arXiv 2402.10571) with identity for f.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rdpo.config import Loss

SMALLEST_GAP = 1e-6


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probs (P,) of both answers under policy and reference, in nats, and their tokens (P,).

    `weight` (P,): what the policy multiplies each pair's loss with, see `policy_weight`; without it 1.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    weight: Tensor | None = field(default=None, kw_only=True)

    @property
    def chosen_ratio(self) -> Tensor:
        """log pi(y_w|x) - log ref(y_w|x)."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log pi(y_l|x) - log ref(y_l|x)."""
        return self.rejected - self.reference_rejected

    @property
    def delta(self) -> Tensor:
        """How much further the policy moved towards chosen than towards rejected."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_delta(self) -> Tensor:
        """The same from log-ratios per token."""
        return self.chosen_ratio / self.chosen_length - self.rejected_ratio / self.rejected_length

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the chosen answer, in nats per token."""
        return -self.chosen / self.chosen_length


@dataclass(frozen=True)
class RewardTerms:
    """What the external reward says of P pairs, ready for the loss: each (P,)."""

    offset: Tensor
    label: Tensor
    weight: Tensor
    sharpness: Tensor


def reward_terms(gap: Tensor, loss: Loss) -> RewardTerms:
    """How scaled reward gaps (P,) enter the loss; all but the chosen way are at rest."""
    one, zero = torch.ones_like(gap), torch.zeros_like(gap)
    probability = torch.sigmoid(gap / loss.reward_temperature)
    return RewardTerms(
        offset=loss.offset_coef * _transformed(gap, loss) if loss.reward_use == "offset" else zero,
        label=probability if loss.reward_use == "soft_label" else one,
        weight=probability if loss.reward_use == "weight" else one,
        sharpness=2 * probability - 1 if loss.reward_use == "geometric_label" else one,
    )


def _transformed(gap: Tensor, loss: Loss) -> Tensor:
    """f(gap): itself, or ODPO's logarithm (arXiv 2402.10571), which is meant for positive gaps."""
    return gap if loss.offset_transform == "identity" else gap.clamp_min(SMALLEST_GAP).log()


def preference_loss(logps: PairLogps, reward: RewardTerms, loss: Loss) -> Tensor:
    """Loss (P,) of each pair by the settings in `loss`.

    Raises:
        ValueError: it is one over whole groups.
    """
    if loss.loss not in LOSSES:
        raise ValueError(f"{loss.loss} is a loss over groups: rdpo.training.group_losses.group_loss takes them")
    label = reward.label * (1 - loss.label_smoothing) + (1 - reward.label) * loss.label_smoothing
    per_pair = reward.weight * LOSSES[loss.loss](logps, reward, label, loss)
    if logps.weight is not None:
        per_pair = logps.weight * per_pair
    return per_pair + loss.sft_coef * logps.nll if loss.sft_coef else per_pair


def policy_weight(likeness: Tensor) -> Tensor:
    """Weights (P,) of WPO (arXiv 2406.11827) from the likeness (2 P,) of all chosen answers, then of all rejected ones.

    An answer weighs exp mean_t( log pi_t - log sum_v pi_v^2 ) under the current policy: sum_v pi_v^2 is how likely the
    policy's own draw is on average. A pair weighs the product of both, at most 1. The bound is the authors' program's.
    """
    chosen, rejected = likeness.detach().chunk(2)
    return torch.exp(chosen + rejected).clamp_max(1.0)


def _margin(score: Tensor, logps: PairLogps, reward: RewardTerms, loss: Loss) -> Tensor:
    """beta * S - m: the reward's offset, the length term of R-DPO and SimPO's margin subtracted.

    R-DPO (arXiv 2403.19159) maximises E[r] - alpha * E|y|, an external reward of -alpha * |y|:
    its offset is -alpha * (|y_w| - |y_l|). Geometric labels (arXiv 2409.06691) scale beta by
    2 p - 1.
    """
    longer = logps.chosen_length - logps.rejected_length
    offset = reward.offset - loss.length_coef * longer + loss.margin
    return loss.beta * reward.sharpness * score - offset


def _ratio(logps: PairLogps, loss: Loss) -> Tensor:
    return logps.mean_delta if loss.normalization == "token_mean" else logps.delta


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """-q log sigmoid(z) - (1 - q) log sigmoid(-z), exactly -log sigmoid(z) where q = 1."""
    right = -logsigmoid(logits)
    # Chosen, not multiplied by 0: where the other term is infinite, 0 times it is not a number.
    return torch.where(label == 1, right, label * right - (1 - label) * logsigmoid(-logits))


def dpo(logps: PairLogps, reward: RewardTerms, label: Tensor, loss: Loss) -> Tensor:
    """DPO (arXiv 2305.18290, Eq. 7); with smoothed labels conservative DPO; with offset refined DPO, ODPO, MODPO."""
    return _cross_entropy(_margin(_ratio(logps, loss), logps, reward, loss), label)


def robust(logps: PairLogps, reward: RewardTerms, label: Tensor, loss: Loss) -> Tensor:
    """Robust DPO (arXiv 2403.00409): unbiased where a share eps of the labels is flipped.

    Unbounded below for eps > 0: the policy gains without end on pairs it already prefers.
    """
    logits, flipped = _margin(_ratio(logps, loss), logps, reward, loss), loss.label_smoothing
    return (-(1 - flipped) * logsigmoid(logits) + flipped * logsigmoid(-logits)) / (1 - 2 * flipped)


def hinge(logps: PairLogps, reward: RewardTerms, label: Tensor, loss: Loss) -> Tensor:
    """Hinge on the log-ratio (SLiC, arXiv 2305.10425; on DPO's ratio in RSO, arXiv 2309.06657)."""
    return torch.relu(1 - _margin(_ratio(logps, loss), logps, reward, loss))


def ipo(logps: PairLogps, reward: RewardTerms, label: Tensor, loss: Loss) -> Tensor:
    """IPO (arXiv 2310.12036, Eq. 17) with tau = beta: (S - m / beta - 1 / (2 beta))^2.

    The authors' own form is normalised by length (`normalization = "token_mean"`); others sum.
    """
    return (_margin(_ratio(logps, loss), logps, reward, loss) / loss.beta - 1 / (2 * loss.beta)).square()


def regression(logps: PairLogps, reward: RewardTerms, label: Tensor, loss: Loss) -> Tensor:
    """Reward regression (beta * S - m)^2: REBEL (arXiv 2404.16767), distilled DPO (arXiv 2405.19316)."""
    return _margin(_ratio(logps, loss), logps, reward, loss).square()


def simpo(logps: PairLogps, reward: RewardTerms, label: Tensor, loss: Loss) -> Tensor:
    """SimPO (arXiv 2405.14734, Eq. 6): mean log-probs, no reference; `margin` is gamma, not gamma / beta."""
    score = logps.chosen / logps.chosen_length - logps.rejected / logps.rejected_length
    return _cross_entropy(_margin(score, logps, reward, loss), label)


def orpo(logps: PairLogps, reward: RewardTerms, label: Tensor, loss: Loss) -> Tensor:
    """ORPO (arXiv 2403.07691, Eq. 6) with lambda = beta: NLL of the chosen answer, and the odds ratio's loss.

    The likelihood is the answer's alone, as in the paper (some trainers count the prompt too).
    """
    chosen, rejected = logps.chosen / logps.chosen_length, logps.rejected / logps.rejected_length
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return logps.nll + loss.beta * _cross_entropy(odds - reward.offset, label)


def _log1mexp(log_probability: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, without cancellation near 0."""
    safe = log_probability.clamp_max(-1e-7)
    # Either form loses its digits on the other side of -log 2 (Maechler, 2012).
    return torch.where(safe > -0.6931, torch.log(-torch.expm1(safe)), torch.log1p(-torch.exp(safe)))


def sppo(logps: PairLogps, reward: RewardTerms, label: Tensor, loss: Loss) -> Tensor:
    """SPPO (arXiv 2405.00675) with eta = 1 / beta: half the sum of both answers' squares.

    Hard labels are P = 1 and 0; with soft ones P(y_w) = q and P(y_l) = 1 - q.
    """
    win = (label - 0.5) / loss.beta
    return 0.5 * ((logps.chosen_ratio - win).square() + (logps.rejected_ratio + win).square())


def kto(logps: PairLogps, reward: RewardTerms, label: Tensor, loss: Loss) -> Tensor:
    """KTO's two terms (arXiv 2402.01306, Eq. 8) on a pair, with equal weights.

    z0 is `reference_point`, a constant, and not the batch's estimate: so a pair's loss does not depend
    on its neighbours, and accumulation equals the large batch.
    """
    lift = loss.beta * (logps.chosen_ratio - loss.reference_point) - reward.offset
    drop = loss.beta * (loss.reference_point - logps.rejected_ratio) - reward.offset
    return 2 - torch.sigmoid(lift) - torch.sigmoid(drop)


def bco(logps: PairLogps, reward: RewardTerms, label: Tensor, loss: Loss) -> Tensor:
    """Binary classifier optimisation (arXiv 2404.04656) on a pair; its shift is `reference_point`, constant."""
    shift = loss.reference_point
    return -logsigmoid(loss.beta * logps.chosen_ratio - shift) - logsigmoid(shift - loss.beta * logps.rejected_ratio)


def apo_zero(logps: PairLogps, reward: RewardTerms, label: Tensor, loss: Loss) -> Tensor:
    """APO-zero (arXiv 2408.06266): chosen answers become likelier and rejected ones less likely than they were.

    For chosen answers that are better than what the start model writes.
    """
    return torch.sigmoid(-loss.beta * logps.chosen_ratio) + torch.sigmoid(loss.beta * logps.rejected_ratio)


def apo_down(logps: PairLogps, reward: RewardTerms, label: Tensor, loss: Loss) -> Tensor:
    """APO-down (arXiv 2408.06266): both become less likely, rejected ones by more.

    For chosen answers that are worse than what the start model writes.
    """
    return torch.sigmoid(loss.beta * logps.chosen_ratio) + torch.sigmoid(-loss.beta * logps.delta)


def exo(logps: PairLogps, reward: RewardTerms, label: Tensor, loss: Loss) -> Tensor:
    """EXO on a pair (arXiv 2402.00856, Eq. 16): the reverse KL of the policy's preference from the smoothed label.

    DPO has the forward KL. With a label that is certain it is infinite, so `label_smoothing` must be above 0.
    """
    logits = _margin(_ratio(logps, loss), logps, reward, loss)
    right, wrong = torch.sigmoid(logits), torch.sigmoid(-logits)
    return right * (logsigmoid(logits) - label.log()) + wrong * (logsigmoid(-logits) - (1 - label).log())


def sft(logps: PairLogps, reward: RewardTerms, label: Tensor, loss: Loss) -> Tensor:
    """Supervised fine-tuning on the chosen answer: its negative log-likelihood per token; a baseline of rDPO's."""
    return logps.nll


LOSSES: dict[str, Callable[[PairLogps, RewardTerms, Tensor, Loss], Tensor]] = {
    function.__name__: function
    for function in (
        *(dpo, robust, hinge, ipo, regression, exo, simpo),
        *(orpo, sppo, kto, bco, apo_zero, apo_down, sft),
    )
}


def implicit_rewards(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """DPO's implicit reward (P,): beta * log(pi / ref)."""
    return (beta * (policy_logps - reference_logps)).detach()
