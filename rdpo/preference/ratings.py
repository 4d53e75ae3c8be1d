"""Ratings in a judge's reply: their expected value under the judge's probabilities, or the one it wrote down."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TypeVar

from rdpo.config import JudgeReward
from rdpo.config.rewards import RATING
from rdpo.errors import InputError
from rdpo.modeling.chat import Chat
from rdpo.synthesis.instructions import check_template

NUMBER = r"[-+\u2212]?\d+(?:[.,]\d+)?"
# Not from the middle of a word or number: a long row of digits would be tried from each of them.
WHOLE = rf"(?<![\w.,])({NUMBER})(?!\w|[.,]\d)"
BRACKETED = re.compile(rf"\[\[\s*({NUMBER})\s*\]\]")
OF_A_TOP = re.compile(rf"{WHOLE}\s*(?:/|out\s+of)\s*({NUMBER})", re.IGNORECASE)
ANY = re.compile(WHOLE)
# "5 = best", "(1 being the worst)": what an end of the scale means.
MEANING = re.compile(rf"{WHOLE}\s*(?:=|means\b|being\b)\s*[^\W\d]\w*", re.IGNORECASE)
RANGE = re.compile(rf"{WHOLE}\s*(-|\u2013|\u2212|to|and)\s*({NUMBER})(?!\w|[.,]\d)", re.IGNORECASE)
# What may stand between "rating" and its number: "is", "this answer", a colon, marks of Markdown, a dash.
WORDS = r"(?:\s+(?:is|was|would|be|it|this|as|at|of|an?|the|answer|response))*"
BETWEEN = WORDS + r"[\s:=*_`\"'(){}\[\]|#>]*(?:\s[-\u2013]\s+)?"
FINAL = re.compile(rf"\b(?:final|overall|total)(?:\s+(?:rating|score|grade))?{BETWEEN}{WHOLE}", re.IGNORECASE)
LABELLED = re.compile(rf"\b(?:rating|score|grade|rate){BETWEEN}{WHOLE}", re.IGNORECASE)
LEAST_SHARE = 0.005
"""Of the probability that a judge gives to its next token, the least share that its ratings must have together."""
UNLISTED = 1e-3
"""Of the scale, how far an expected rating may be moved by ratings whose probability a server does not say."""

Token = TypeVar("Token", int, str)
"""A token by its id, or by its text where a server says no more."""


def check_rubric(reward: JudgeReward) -> None:
    """Check the names that the rubric uses.

    Raises:
        InputError: it is no valid template, or uses a name that the judge does not get.
    """
    where = f"rewards.{reward.name}"
    known = {"prompt", "first", "second"} if reward.pairwise else {"prompt", "answer"}
    by_criteria = bool(reward.criteria) or reward.criteria_column is not None
    if by_criteria:
        known = known | {"criterion"}
    used = check_template(reward.rubric, where)
    if "criterion" in used and not by_criteria:
        raise InputError(f"{where}.rubric uses criterion; give criteria, or criteria_column, to judge by")
    if by_criteria and "criterion" not in used:
        raise InputError(f"{where}.rubric asks the same for every criterion; use {{{{ criterion }}}} in it")
    if used - known:
        allowed = ", ".join(f"`{name}`" for name in sorted(known))
        raise InputError(f"{where}.rubric uses {', '.join(sorted(used - known))}; it may use {allowed}")


def rating_values(chat: Chat, reward: JudgeReward) -> dict[int, float]:
    """Value of each rating by its token id: its number, else its position; of a pair's two, 1 for the first.

    Raises:
        InputError: a rating is not one token.
    """
    values = {}
    for rating, value in rating_counts(reward).items():
        ids = chat.text_ids(rating)
        if len(ids) != 1:
            raise InputError(f"rewards.{reward.name}.ratings: {rating!r} is {len(ids)} tokens; a rating must be one")
        values[ids[0]] = value
    return values


def rating_counts(reward: JudgeReward) -> dict[str, float]:
    """Value of each rating by its text: its number, else its position; of a pair's two, 1 for the first."""
    counts = {}
    for position, rating in enumerate(reward.ratings):
        counts[rating] = 1.0 - position if reward.pairwise else rating_value(rating, position)
    return counts


def rating_value(rating: str, position: int) -> float:
    """What one rating counts: its number, or its position where it is a word."""
    return _number(rating.strip()) if re.fullmatch(NUMBER, rating.strip()) else float(position)


def rating_share(values: Mapping[Token, float], logprobs: Mapping[Token, float]) -> float:
    """The share of the next token's probability, 0 to 1, that all ratings have together."""
    return sum(math.exp(logprobs[token]) for token in values if token in logprobs)


def expected_rating(values: Mapping[Token, float], logprobs: Mapping[Token, float]) -> float:
    """Mean of the ratings' values under their probabilities, made to sum to one.

    NaN where the ratings' share is below `LEAST_SHARE`: then the judge says something else, and what is left over is
    noise.
    """
    share = rating_share(values, logprobs)
    if share < LEAST_SHARE:
        return math.nan
    return sum(value * math.exp(logprobs[token]) for token, value in values.items() if token in logprobs) / share


def certain_rating(values: Mapping[Token, float], logprobs: Mapping[Token, float]) -> float:
    """`expected_rating`, where it is one and known.

    Args:
        values: value of each rating.
        logprobs: those of the ratings, or of a server's likeliest tokens, among which ratings may be missing.

    Raises:
        ValueError: the ratings have hardly any probability, or one that is missing may have too much.
    """
    share, missing = rating_share(values, logprobs), missing_share(values, logprobs)
    if share + missing < LEAST_SHARE:
        raise ValueError(f"the judge's ratings have {share:.2g} of its next token's probability together")
    if missing > UNLISTED * share:
        absent = ", ".join(repr(token) for token in values if token not in logprobs)
        raise ValueError(
            f"ratings beyond the judge's {len(logprobs)} likeliest tokens ({absent}) may have {missing:.2g} of the "
            f"probability, those among them {share:.2g}"
        )
    return expected_rating(values, logprobs)


def missing_share(values: Mapping[Token, float], logprobs: Mapping[Token, float]) -> float:
    """The most that the ratings which are not among the likeliest tokens may have of the next token's probability.

    A token that is not listed is at most as likely as the last one that is. As a text a rating may be several tokens:
    then it is at most as likely as the listed one that it begins with.
    """
    missing = [token for token in values if token not in logprobs]
    if not missing or not logprobs:
        return 0.0
    least = math.exp(min(logprobs.values()))
    rest = max(0.0, 1.0 - sum(map(math.exp, logprobs.values())))

    begun = 0.0
    for token, chance in logprobs.items():
        if any(_begins_with(rating, token) for rating in missing):
            begun += math.exp(chance)
    return min(least * len(missing), rest) + begun


def _begins_with(rating: int | str, token: int | str) -> bool:
    return isinstance(rating, str) and isinstance(token, str) and token != "" and rating.startswith(token)


def written_rating(reply: str, lowest: float, highest: float) -> float:
    """The rating in a reply that may reason first, with its sign and decimals; NaN if there is none, or several.

    What repeats the scale (`1-5`, `5 = best`) is left out. Then the first of these that is found counts: the last
    `[[4]]`; `Final score: 4`, `Overall: 4`; `Rating: 4`, `Score: 4`; `4/5` or `4 out of 5`, with the scale's highest; a
    last line that is nothing but a number; the only number. Where one of these gives different numbers, or one off
    the scale, there is no rating. (The released rDPO notebooks take the first run of digits anywhere.)
    """
    text = RANGE.sub(lambda found: _without_scale(found, lowest, highest), MEANING.sub(" ", reply))
    tops = list(OF_A_TOP.finditer(text))
    # "4/10" is no rating from 1 to 5, nor is "4-5", under whatever name.
    foreign = {found.start(1) for found in tops if _number(found[2]) != highest}
    foreign |= {found.start(1) for found in RANGE.finditer(text) if found[2].lower() != "and"}

    if marked := BRACKETED.findall(text):
        return _agreed([_number(marked[-1])], lowest, highest)
    for pattern in (FINAL, LABELLED):
        if found := list(pattern.finditer(text)):
            return _agreed([math.nan if one.start(1) in foreign else _number(one[1]) for one in found], lowest, highest)
    if rated := [_number(found[1]) for found in tops if found.start(1) not in foreign]:
        return _agreed(rated, lowest, highest)
    if alone := re.fullmatch(rf"\W*?({NUMBER})\W*", (text.strip().splitlines() or [""])[-1]):
        return _agreed([_number(alone[1])], lowest, highest)
    return _agreed([_number(one) for one in ANY.findall(text)], lowest, highest)


def json_rating(reply: str, lowest: float, highest: float) -> float:
    """The `rating` of a reply that is a JSON object; NaN if it is none, cut off for example, or off the scale."""
    try:
        rating = json.loads(reply)[RATING]
    except (ValueError, TypeError, LookupError, RecursionError):
        return math.nan
    is_number = isinstance(rating, int | float) and not isinstance(rating, bool)
    return float(rating) if is_number and lowest <= rating <= highest else math.nan


def _without_scale(found: re.Match[str], lowest: float, highest: float) -> str:
    ends = (_number(found[1]), _number(found[3]))
    return " " if ends == (lowest, highest) else found[0]


def _agreed(numbers: list[float], lowest: float, highest: float) -> float:
    """The one number of the scale that all of them are; NaN if they differ."""
    first = numbers[0] if numbers else math.nan
    return first if lowest <= first <= highest and all(number == first for number in numbers) else math.nan


def _number(text: str) -> float:
    return float(text.replace(",", ".").replace("\u2212", "-"))
