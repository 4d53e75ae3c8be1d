"""Ratings in a judge's reply: their expected value under the judge's probabilities, or the one it wrote down."""

from __future__ import annotations

import math
import re

from rdpo.config import JudgeReward
from rdpo.errors import InputError
from rdpo.modeling.chat import Chat
from rdpo.synthesis.instructions import check_template

NUMBER = r"[-+\u2212]?\d+(?:[.,]\d+)?"
BRACKETED = re.compile(rf"\[\[\s*({NUMBER})\s*\]\]")
# Not from the middle of a number: a long row of digits would be tried from each of them.
OF_A_SCALE = re.compile(r"((?:[-+\u2212]|(?<!\d))\d+(?:[.,]\d+)?)\s*(?:/|out of)\s*\d+(?:[.,]\d+)?", re.IGNORECASE)
LAST = re.compile(rf"(?<![\w.,])({NUMBER})(?![\w])")


def check_rubric(reward: JudgeReward) -> None:
    """Check the names that the rubric uses.

    Raises:
        InputError: it is no valid template, or uses a name that the judge does not get.
    """
    where = f"rewards.{reward.name}"
    known = {"prompt", "first", "second"} if reward.pairwise else {"prompt", "answer"}
    used = check_template(reward.rubric, where)
    if used - known:
        allowed = ", ".join(f"`{name}`" for name in sorted(known))
        raise InputError(f"{where}.rubric uses {', '.join(sorted(used - known))}; it may use {allowed}")


def rating_values(chat: Chat, reward: JudgeReward) -> dict[int, float]:
    """Value of each rating by its token id: its number, else its position; of a pair's two, 1 for the first.

    Raises:
        InputError: a rating is not one token.
    """
    values = {}
    for position, rating in enumerate(reward.ratings):
        ids = chat.text_ids(rating)
        if len(ids) != 1:
            raise InputError(f"rewards.{reward.name}.ratings: {rating!r} is {len(ids)} tokens; a rating must be one")
        values[ids[0]] = 1.0 - position if reward.pairwise else rating_value(rating, position)
    return values


def rating_value(rating: str, position: int) -> float:
    """What one rating counts: its number, or its position where it is a word."""
    return _number(rating.strip()) if re.fullmatch(NUMBER, rating.strip()) else float(position)


def expected_rating(values: dict[int, float], logprobs: dict[int, float]) -> float:
    """Mean of the ratings' values under their probabilities, made to sum to one; NaN if none has any."""
    present = {token: math.exp(logprobs[token]) for token in values if token in logprobs}
    total = sum(present.values())
    return sum(values[token] * p for token, p in present.items()) / total if total > 0 else math.nan


def written_rating(reply: str, lowest: float, highest: float) -> float:
    """The rating at the end of a reply that reasons first, with its sign and decimals; NaN if there is none.

    `[[4]]` counts before `4/5` or `4 out of 5`, and these before any last number. A number off the scale is none.
    (The released rDPO notebooks take the first run of digits anywhere, which loses signs and decimals.)
    """
    for pattern in (BRACKETED, OF_A_SCALE, LAST):
        found = pattern.findall(reply)
        if found:
            number = _number(found[-1])
            return number if lowest <= number <= highest else math.nan
    return math.nan


def _number(text: str) -> float:
    return float(text.replace(",", ".").replace("\u2212", "-"))
