"""Ratings out of a judge's words: the one it ends with, with its sign and decimals, on the scale or none."""

import math

import pytest

from rdpo.config import JudgeReward
from rdpo.errors import InputError
from rdpo.modeling.chat import make_chat
from rdpo.preference.ratings import (
    certain_rating,
    check_rubric,
    expected_rating,
    missing_share,
    rating_share,
    rating_values,
    written_rating,
)
from tests.support.models import byte_tokenizer


def judge(**changes):
    settings = {"kind": "judge", "name": "j", "rubric": "{{ prompt }} {{ answer }}", **changes}
    return JudgeReward.model_validate(settings)


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("3 things are wrong, 2 of them grave.\nOverall: -4", -4.0),
        ("It is mostly fine. Score: 4.5", 4.5),
        ("Rating: 4,5", 4.5),
        ("I say \u22122.", -2.0),
        ("The answer has 3 errors: 4/5", 4.0),
        ("4 out of 5, since 2 parts are missing", 4.0),
        ("[[2]] although 5 was near", 2.0),
        ("+3", 3.0),
        ("Overall 12", math.nan),
        ("no number here, only v2b and x7", math.nan),
        ("Rating: 4 (on a -5 to 5 scale)", 4.0),
        ("It has 3 faults.\n\n**-2**", -2.0),
        ("Rating: 4-5", math.nan),
        ("", math.nan),
    ],
)
def test_written_rating(reply, rating):
    assert written_rating(reply, -5, 5) == pytest.approx(rating, nan_ok=True)


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: 4 (on a 1-5 scale)", 4.0),
        ("Final score: 1 (1 = worst, 5 = best)", 1.0),
        ("Rating: 4/5, because 2/3 of the claims hold", 4.0),
        ("2/3 of the claims hold, so 3/5", 3.0),
        ("On a scale from 1 to 5 I give 2.", 2.0),
        ("Rating (1\u20135): 3", 3.0),
        ("Score: 2 out of 5", 2.0),
        ("I would rate this answer 4", 4.0),
        ("Style score: 2\nFacts score: 5\nOverall score: 3", 3.0),
        ("Rating: 8/10", math.nan),
        ("Rating: 4/10", math.nan),
        ("Rating: 2. On second thoughts, rating: 4", math.nan),
        ("3/5, or rather 4/5", math.nan),
        ("[[2]], no, [[4]]", 4.0),
        ("a 2, perhaps a 4", math.nan),
        ("Rating: 4. Again: rating 4", 4.0),
        ("Score" + " " * 50_000, math.nan),
        ("1" * 50_000, math.nan),
    ],
)
def test_a_scale_that_is_repeated_is_no_rating_and_ratings_that_differ_are_none(reply, rating):
    assert written_rating(reply, 1, 5) == pytest.approx(rating, nan_ok=True)


def test_ratings_that_the_judge_hardly_thinks_of_are_none():
    values = {1: 1.0, 5: 5.0}
    assert math.isnan(expected_rating(values, {1: math.log(1e-9), 5: math.log(2e-9)}))
    assert rating_share(values, {1: math.log(0.3), 5: math.log(0.1), 9: math.log(0.5)}) == pytest.approx(0.4)


def test_expected_rating_is_over_the_ratings_alone():
    logprobs = {1: math.log(0.3), 2: math.log(0.1), 9: math.log(0.5)}
    assert expected_rating({1: 5.0, 2: 1.0}, logprobs) == pytest.approx(4.0)
    assert math.isnan(expected_rating({1: 5.0}, {9: 0.0}))


def test_values_of_ratings():
    chat = make_chat(byte_tokenizer(), [], "m")
    ids = [chat.text_ids(word)[0] for word in ("7", "b", "c")]
    assert rating_values(chat, judge(ratings=["7", "b", "c"])) == dict(zip(ids, (7.0, 1.0, 2.0), strict=True))
    pair = judge(ratings=["b", "c"], pairwise=True, rubric="{{ first }} {{ second }}")
    assert rating_values(chat, pair) == {ids[1]: 1.0, ids[2]: 0.0}
    with pytest.raises(InputError, match="'-5' is 2 tokens"):
        rating_values(chat, judge(ratings=["-5", "5"]))


def test_a_rubric_may_use_what_the_judge_is_given():
    check_rubric(judge())
    with pytest.raises(InputError, match="uses answer; it may use `first`, `prompt`, `second`"):
        check_rubric(judge(pairwise=True, ratings=["A", "B"]))
    with pytest.raises(InputError, match="template"):
        check_rubric(judge(rubric="{{ answer"))


@pytest.mark.parametrize(
    "changes",
    [
        {"pairwise": True},
        {"pairwise": True, "ratings": ["A", "B"], "score": "written"},
        {"votes": 3},
        {"votes": 3, "score": "written", "sampling": {"temperature": 0}},
    ],
)
def test_settings_that_do_not_go_together(changes):
    with pytest.raises(ValueError, match=r"pairwise takes two|votes are drawn"):
        judge(**changes)


@pytest.mark.parametrize(
    ("values", "chances", "missing"),
    [
        ({"1": 1, "5": 5}, {"1": 0.5, "5": 0.3, "x": 0.1}, 0.0),
        # At most as likely as the last that is listed, and not more than what is left.
        ({"1": 1, "5": 5}, {"1": 0.5, "x": 0.1}, 0.1),
        ({"1": 1, "4": 4, "5": 5}, {"1": 0.5, "x": 0.45}, 0.05),
        # Of several tokens: as likely as the first of them, which counts once.
        ({"-1": -1, "-2": -2, "1": 1}, {"1": 0.5, "-": 0.4}, 0.5),
        ({"1": 1, "10": 10}, {"1": 0.6, "x": 0.3}, 0.7),
        ({7: 1, 8: 2}, {7: 0.6, 9: 0.3}, 0.1),
        ({"1": 1}, {}, 0.0),
    ],
)
def test_the_most_that_missing_ratings_may_have(values, chances, missing):
    logprobs = {token: math.log(chance) for token, chance in chances.items()}
    assert missing_share(values, logprobs) == pytest.approx(missing)
    if missing > 0.01:
        with pytest.raises(ValueError, match="likeliest tokens"):
            certain_rating(values, logprobs)


def test_the_error_of_missing_ratings_is_a_thousandth_of_the_scale_at_most():
    values, logprobs = {"1": 1.0, "5": 5.0}, {"1": math.log(0.9985), "x": math.log(0.0008)}
    assert certain_rating(values, logprobs) == 1.0
    # The missing one might have as much as the last that is listed.
    assert expected_rating(values, {**logprobs, "5": math.log(0.0007)}) == pytest.approx(1.0, abs=4 * 1e-3)
