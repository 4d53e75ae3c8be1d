"""A judge behind a server on loopback: its ratings by the probabilities that the server says, and where it cannot."""

import asyncio
import io
import json
import math

import pyarrow as pa
import pytest
from aiohttp import web
from pydantic import SecretStr

from rdpo.config import Job, JudgeReward
from rdpo.errors import EndpointDown, InputError
from rdpo.execution.run import Run
from rdpo.files.stage_folder import StageFolder
from rdpo.files.unfinished import UNFINISHED
from rdpo.preference.rewards.judge import JudgeKind
from rdpo.preference.rewards.judge_endpoint import ServedJudge
from rdpo.records import table_of
from rdpo.stages.rewards import summary
from rdpo.tracking.console import Console
from tests.support.chat_server import QUICK, Server, completion, first_token
from tests.support.crash_counts import NoCrashCounts

PROMPT = [{"role": "user", "content": "q"}]
DIGITS = {"5": math.log(0.6), "4": math.log(0.3), "A": math.log(0.06), "1": math.log(0.04)}


def reward(**changes):
    endpoint = {"url": "http://judge/v1", "model": "m", **changes.pop("endpoint", {})}
    settings = {"kind": "judge", "name": "j", "rubric": "{{ prompt }} {{ answer }}", "ratings": ["1", "4", "5"]}
    return JudgeReward.model_validate({**settings, "endpoint": endpoint, **changes})


async def judged(server, job_table, rows, answers, **changes):
    async with server.running() as address:
        endpoint = {"url": f"{address}/v1", **QUICK, "retries": 1, **changes.pop("endpoint", {})}
        job = Job.model_validate(job_table)
        judge = ServedJudge(reward(endpoint=endpoint, **changes), answers, job, NoCrashCounts, SecretStr("geheim"))
        rows = [{"prompt_id": str(number), "prompt": PROMPT, **row} for number, row in enumerate(rows)]
        return [row async for block in judge(pa.Table.from_pylist(rows)) for row in block.to_pylist()]


def judge(server, job_table, *rows, **changes):
    return asyncio.run(judged(server, job_table, rows or [{"a": "x"}], changes.pop("answers", ["a"]), **changes))


def tokenizing(ids):
    """vLLM's route: the token ids of texts."""

    async def tokenize(request):
        return web.json_response({"tokens": ids[(await request.json())["prompt"]], "count": 1, "max_model_len": 9})

    return tokenize


def ended(row):
    """Name and message of the error that left a row unfinished."""
    return json.loads(row[UNFINISHED])


def test_expected_ratings_are_read_from_the_texts_of_the_likeliest_tokens(job_table):
    server = Server(first_token(DIGITS))
    (row,) = judge(server, job_table)
    assert row["a_scores"]["j"] == pytest.approx((5 * 0.6 + 4 * 0.3 + 1 * 0.04) / 0.94)
    assert (row["tokens_read_j"], row["tokens_written_j"]) == (7, 3)
    asked = server.asked[0]
    assert (asked["logprobs"], asked["top_logprobs"], asked["max_tokens"], asked["temperature"]) == (True, 20, 1, 0)
    assert asked["messages"] == [{"role": "user", "content": "q x"}]
    assert "logprob_token_ids" not in asked


def test_vllms_server_is_asked_for_the_ratings_by_their_ids(job_table):
    by_id = {"token_id:11": math.log(0.2), "token_id:12": math.log(0.2), "token_id:99": math.log(0.6)}
    server = Server(first_token(by_id))
    server.routes["/tokenize"] = tokenizing({"1": [11], "5": [12]})
    (row,) = judge(server, job_table, ratings=["1", "5"])
    assert row["a_scores"]["j"] == pytest.approx(3.0)
    assert server.asked[0]["logprob_token_ids"] == [11, 12]


def test_a_server_that_cannot_say_the_tokens_yet_is_asked_again(job_table):
    by_id = {"token_id:11": math.log(0.2), "token_id:12": math.log(0.2), "token_id:99": math.log(0.6)}
    server = Server(first_token({"1": math.log(0.5), "5": math.log(0.5)}), first_token(by_id), first_token(by_id))
    tokenize, times = tokenizing({"1": [11], "5": [12]}), []

    async def sometimes(request):
        times.append(1)
        return web.json_response({}, status=503) if len(times) <= 2 else await tokenize(request)

    server.routes["/tokenize"] = sometimes
    rows = judge(server, job_table, {"a": "x"}, {"a": "y"}, {"a": "z"}, ratings=["1", "5"])
    assert [row["a_scores"]["j"] for row in rows] == pytest.approx([3.0] * 3)
    assert ["logprob_token_ids" in asked for asked in server.asked].count(True) >= 1


def test_a_rating_of_two_tokens_ends_the_run(job_table):
    server = Server()
    server.routes["/tokenize"] = tokenizing({"-5": [1, 2], "5": [2]})
    (row,) = judge(server, job_table, ratings=["-5", "5"])
    assert ended(row) == ["InputError", "rewards.j.ratings: '-5' is 2 tokens of m; a rating must be one"]
    assert server.asked == []


@pytest.mark.parametrize("logprobs", [None, {}])
def test_a_server_without_probabilities_is_refused_with_the_remedy(job_table, logprobs):
    rows = judge(Server(*[first_token(logprobs)] * 9), job_table, {"a": "x"}, {"a": "y"})
    for name, said in map(ended, rows):
        assert name == "InputError"
        assert said.startswith("rewards.j.endpoint: http://127.0.0.1")
        assert 'top_logprobs), which expected ratings are made of; set score = "written"' in said


def test_a_server_that_refuses_to_be_asked_for_them_is_said_what_to_set(job_table):
    class Refuses(Server):
        async def answer(self, request):
            self.asked.append(await request.json())
            return web.json_response({"error": {"message": "top_logprobs must be at most 5"}}, status=400)

    (row,) = judge(Refuses(), job_table)
    name, said = ended(row)
    assert name == "InputError"
    assert 'give rewards.j.top_logprobs the number that it takes, or rewards.j.score = "written"' in said


@pytest.mark.parametrize(
    ("logprobs", "reason"),
    [
        ({"Sure": math.log(0.99), "5": math.log(0.001), "1": math.log(1e-9)}, "the judge's ratings have 0.001 of its"),
        ({"5": math.log(0.2), "4": math.log(0.2), "x": math.log(0.1)}, r"3 likeliest tokens ('1') may have 0.1 of"),
        ({"-": math.log(0.4), "5": math.log(0.5), "4": math.log(1e-9)}, r"('-1') may have 0.4 of"),
    ],
)
def test_ratings_that_may_have_been_meant_drop_the_row_with_the_reason(job_table, logprobs, reason):
    ratings = ["-1" if "-" in logprobs else "1", "4", "5"]
    (row,) = judge(Server(first_token(logprobs)), job_table, ratings=ratings)
    assert row["dropped"].startswith("reward j: ") and reason in row["dropped"]


def test_ratings_that_are_not_listed_and_cannot_matter_count_as_nothing(job_table):
    logprobs = {"5": math.log(0.9), "x": math.log(0.0999), "4": math.log(1e-5)}
    (row,) = judge(Server(first_token(logprobs)), job_table)
    assert row["dropped"] is None
    assert row["a_scores"]["j"] == pytest.approx(5, abs=1e-4)


def test_two_tokens_of_one_text_count_together(job_table):
    class Twice(Server):
        async def answer(self, request):
            reply = first_token({"5": math.log(0.25), "1": math.log(0.5)})
            listed = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            listed.append({**listed[0]})
            return web.json_response(reply)

    (row,) = judge(Twice(), job_table, ratings=["1", "5"])
    assert row["a_scores"]["j"] == pytest.approx(3.0)


def test_a_pair_is_shown_in_both_orders(job_table):
    server = Server(*[first_token({"A": math.log(0.8), "B": math.log(0.2)})] * 2)
    rubric = "{{ prompt }} {{ first }} {{ second }}"
    settings = {"answers": ["a", "b"], "rubric": rubric, "pairwise": True, "ratings": ["A", "B"]}
    (row,) = judge(server, job_table, {"a": "x", "b": "y"}, **settings)
    assert (row["a_scores"]["j"], row["b_scores"]["j"]) == (pytest.approx(0.5), pytest.approx(0.5))
    assert {asked["messages"][0]["content"] for asked in server.asked} == {"q x y", "q y x"}
    assert row["tokens_read_j"] == 14


def test_written_votes_are_drawn_with_seeds_of_their_own_and_averaged(job_table):
    server = Server(completion("Overall: 4"), completion("Overall: 5"), completion("no number"))
    (row,) = judge(server, job_table, score="written", votes=3, sampling={"temperature": 0.5, "max_tokens": 9})
    assert row["a_scores"]["j"] == pytest.approx(4.5)
    assert len({asked["seed"] for asked in server.asked}) == 3
    assert {(asked["max_tokens"], asked["temperature"]) for asked in server.asked} == {(9, 0.5)}


def test_what_a_reply_begins_with_is_gone_on_from_where_the_server_says_so(job_table):
    said = {"prompt_text": "<user>q x<assistant>Rating: "}
    server = Server(first_token(DIGITS, **said))
    (row,) = judge(server, job_table, prefill="Rating: ")
    assert row["dropped"] is None
    asked = server.asked[0]
    assert asked["messages"][-1] == {"role": "assistant", "content": "Rating: "}
    assert (asked["add_generation_prompt"], asked["continue_final_message"]) == (False, True)

    (row,) = judge(Server(first_token(DIGITS)), job_table, prefill="Rating: ")
    assert ended(row)[1].startswith("rewards.j.prefill: http://127.0.0.1")
    assert "does not say whether its model goes on from it" in ended(row)[1]

    (row,) = judge(Server(first_token(DIGITS, prompt_text="<assistant>Rating:")), job_table, prefill="Rating: ")
    assert "asks with '<assistant>Rating:', which does not end with 'Rating: '" in ended(row)[1]


@pytest.mark.parametrize(
    ("fault", "end", "said"),
    [
        (401, InputError, "rewards.j.endpoint: http"),
        (404, InputError, "does not know 'm'"),
        (403, InputError, "refuses every request, a harmless one too (403)"),
        (429, EndpointDown, "answers nothing any more, 2 attempts ended with (429)"),
        (503, EndpointDown, "the same command resumes"),
        ("slow", EndpointDown, "APITimeoutError"),
    ],
)
def test_what_ends_the_server_loses_no_row(job_table, fault, end, said):
    endpoint = {"timeout_s": 0.2} if fault == "slow" else {}
    rows = judge(Server(*[fault] * 40), job_table, {"a": "x"}, {"a": "y"}, endpoint=endpoint)
    assert [ended(row)[0] for row in rows] == [end.__name__] * 2
    assert said in ended(rows[0])[1]


def test_a_fault_is_asked_again_and_a_row_that_is_refused_alone_is_dropped(job_table):
    server = Server(first_token(DIGITS), 500, first_token(DIGITS), 400, completion(), first_token(DIGITS))
    rows = judge(server, job_table, *[{"a": text} for text in "wxyz"], endpoint={"concurrency": 1}, ratings=["4", "5"])
    reason = "reward j: the endpoint refuses it (400): Error code: 400 - no"
    assert [row["dropped"] for row in rows] == [None, None, reason, None]


def test_an_answer_that_is_withheld_drops_its_row(job_table):
    reply = first_token(DIGITS)
    reply["choices"][0]["finish_reason"] = "content_filter"
    (row,) = judge(Server(reply), job_table)
    assert row["dropped"] == "reward j: the endpoint withholds the answer: content_filter"


def test_a_judge_is_an_endpoint_or_a_model_with_engines():
    for more in ({"model": "a/judge"}, {"engine": {"gpus": 1}}):
        with pytest.raises(ValueError, match="endpoint names a judge already; remove model and engine, or endpoint"):
            reward(**more)
    with pytest.raises(ValueError, match="top_logprobs: engines give every rating's probability"):
        JudgeReward.model_validate({"kind": "judge", "name": "j", "rubric": "x", "top_logprobs": 5})


def test_the_key_must_be_there_before_the_run(job_table, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(InputError, match=r"rewards.j.endpoint.key_variable: JUDGE_KEY is not set"):
        JudgeKind(reward(endpoint={"key_variable": "JUDGE_KEY"})).check(Job.model_validate(job_table))


def test_how_the_judge_is_asked_makes_no_score_again(job_table):
    job, keys = Job.model_validate(job_table), []
    for endpoint in ({}, {"retries": 9, "requests_per_minute": 5, "token_limit": "max_completion_tokens"}):
        keys.append(JudgeKind(reward(endpoint=endpoint, top_logprobs=5)).settings(job))
    assert keys[0] == keys[1]
    assert keys[0]["endpoint"] == {"url": "http://judge/v1", "model": "m"}
    assert JudgeKind(reward(endpoint={"model": "n"})).settings(job) != keys[0]


def test_a_server_takes_no_pool_and_is_tried_before_the_teacher(job_table):
    job = Job.model_validate(job_table)
    assert JudgeKind(reward()).pools(job) == []
    assert JudgeKind(reward()).needs_trial(job)


@pytest.mark.parametrize(
    ("replies", "changes", "said"),
    [
        ([first_token(None)], {}, 'which expected ratings are made of; set score = "written"'),
        ([401], {}, "refuses the key in key_variable"),
        ([404], {}, "does not know 'm'"),
        ([403] * 4, {"score": "written"}, "refuses every request, a harmless one too"),
        ([first_token(DIGITS)], {"prefill": "Rating: "}, "does not say whether its model goes on from it"),
    ],
)
def test_a_server_that_cannot_be_asked_like_this_is_said_before_the_run(job_table, replies, changes, said):
    server = Server(*replies)
    with server.elsewhere() as address, pytest.raises(InputError, match=r"rewards\.j") as refusal:
        JudgeKind(reward(endpoint={"url": f"{address}/v1"}, **changes)).check(Job.model_validate(job_table))
    assert said in str(refusal.value)
    assert len(server.asked) <= 2


@pytest.mark.parametrize("reply", [first_token(DIGITS), first_token({"Sure": -0.1}), 503, 429, "cut"])
def test_a_server_that_is_not_there_yet_or_says_something_else_is_no_fault_before_the_run(job_table, reply):
    server = Server(*[reply] * 3)
    with server.elsewhere() as address:
        JudgeKind(reward(endpoint={"url": f"{address}/v1"})).check(Job.model_validate(job_table))


def test_a_run_in_a_loop_of_its_own_asks_too(job_table):
    async def notebook(address):
        JudgeKind(reward(endpoint={"url": f"{address}/v1"})).check(Job.model_validate(job_table))

    server = Server(first_token(DIGITS))
    with server.elsewhere() as address:
        asyncio.run(notebook(address))
    assert len(server.asked) == 1


def test_what_the_judge_read_and_cost_stands_in_the_summary_and_is_said(job_table, tmp_path):
    rows = [{"prompt_id": str(number), "tokens_read_j": 1000, "tokens_written_j": 10} for number in range(3)]
    # Another reward's name may end as this one's does.
    rows = [{**row, "tokens_read_my_j": 5, "tokens_written_my_j": 5} for row in rows]
    folder = StageFolder(str(tmp_path), "rewards")
    folder.begin("k")
    folder.write_parts(table_of([*rows[:2], {**rows[2], "dropped": "no rating"}]), "prompt_id")
    table = reward(endpoint={"price_per_million": (2.0, 10.0)}).model_dump()
    screen = io.StringIO()
    job = Job.model_validate({**job_table, "rewards": [*job_table["rewards"], table]})
    found = summary(Run(job, str(tmp_path), Console(screen), lambda *_: False), folder)
    cost = pytest.approx((3000 * 2 + 30 * 10) / 1e6)
    assert found == {"endpoints": {"j": {"tokens_read": 3000, "tokens_written": 30, "cost": cost}}}
    assert "endpoint of j: 3000 tokens read, cost 0.01" in screen.getvalue()
    assert summary(Run(Job.model_validate(job_table), str(tmp_path), Console(screen), lambda *_: False), folder) == {}


def spoilt(change):
    """A completion of one token with something else in it than the protocol says."""
    reply = json.loads(json.dumps(first_token(DIGITS)))
    change(reply)
    return reply


@pytest.mark.parametrize(
    "change",
    [
        lambda reply: reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0].update(logprob=1e6),
        lambda reply: reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0].update(logprob="often"),
        lambda reply: reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0].update(logprob=None),
        lambda reply: reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0].update(logprob=10**400),
        lambda reply: reply["choices"][0].update(logprobs="yes"),
        lambda reply: reply["choices"][0]["logprobs"].update(content=7),
        lambda reply: reply["choices"][0]["logprobs"]["content"][0].update(top_logprobs=[7]),
        lambda reply: reply.update(choices={}),
    ],
)
def test_what_is_not_the_protocol_ends_clearly(job_table, change):
    good, bad = first_token(DIGITS), spoilt(change)
    rows = judge(Server(good, *[bad] * 9), job_table, {"a": "x"}, {"a": "y"}, endpoint={"concurrency": 1})
    assert rows[0]["a_scores"]["j"] > 4
    assert rows[1]["dropped"].startswith("reward j: the endpoint ")


def test_counts_that_are_none_are_not_counted(job_table):
    reply = spoilt(lambda reply: reply.update(usage={"prompt_tokens": "many", "completion_tokens": None}))
    (row,) = judge(Server(reply), job_table)
    assert (row["tokens_read_j"], row["tokens_written_j"]) == (0, 0)


def test_a_server_is_asked_for_json_by_its_schema(job_table):
    server = Server(completion('{"reason": "9 flaws", "rating": 4}'))
    (row,) = judge(server, job_table, score="json")
    assert row["a_scores"]["j"] == 4.0
    held = server.asked[0]["response_format"]
    assert held["type"] == "json_schema"
    assert held["json_schema"]["schema"]["properties"]["rating"] == {"enum": [1, 4, 5]}
