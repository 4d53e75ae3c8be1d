"""How many held-out prompts a win rate of a given size needs, before a run is paid for.

A prompt is a win or a loss of the trained model (ties make the variance smaller, so that fewer do). With n prompts the
interval at 95% leaves out one half, when the true win rate is p, with about the probability

    power = Phi((|p - 1/2| sqrt(n) - z / 2) / sqrt(p (1 - p))),    z = 1.96,

the normal approximation of a test on a share (Fleiss, Levin and Paik, Statistical Methods for Rates and Proportions).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.evaluation.intervals import NORMAL

WANTED = 0.8
"""The usual power: of five runs with such an effect, four show it."""
CERTAIN = 0.9999


def power(win_rate: float, prompts: int) -> float:
    """The probability that an interval over so many prompts leaves out one half."""
    spread = math.sqrt(win_rate * (1 - win_rate))
    return NormalDist().cdf((abs(win_rate - 0.5) * math.sqrt(prompts) - NORMAL / 2) / spread)


def prompts_needed(win_rate: float, wanted: float = WANTED) -> int:
    """The fewest prompts with which a win rate is seen with that probability."""
    quantile = NormalDist().inv_cdf(wanted)
    root = (NORMAL / 2 + quantile * math.sqrt(win_rate * (1 - win_rate))) / abs(win_rate - 0.5)
    return math.ceil(root**2)


def smallest_seen(prompts: int, wanted: float = WANTED) -> float | None:
    """The smallest win rate above one half that so many prompts show with that probability; None if they show none."""
    low, high = 0.5, CERTAIN
    if power(high, prompts) < wanted:
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, prompts) >= wanted else (middle, high)
    return high


def power_lines(job: Job, effect: float) -> Iterator[str]:
    """What a win rate of one half and so much more asks of the held-out prompts, and what the job's own can show.

    Raises:
        InputError: there is no such win rate.
    """
    if not 0 < effect < 0.5:
        raise InputError(f"--power {effect:g}: by how much the win rate is above one half, between 0 and 0.5")
    win_rate = 0.5 + effect
    needed = prompts_needed(win_rate)
    yield f"a win rate of {win_rate:.3g} is seen with {WANTED:.0%} power from {needed:,} held-out prompts on"

    limit = job.evaluation.limit
    if limit is None:
        yield "the job evaluates all its held-out prompts; compare their number with that"
        return
    smallest = smallest_seen(limit)
    seen = f"the smallest seen with {WANTED:.0%} is {smallest:.2f}" if smallest else "they show no win rate reliably"
    yield f"evaluation.limit = {limit:,}: {power(win_rate, limit):.0%} power for it; {seen}"
    if limit < needed:
        yield "too few for that effect: raise evaluation.limit, or look for a larger one"
