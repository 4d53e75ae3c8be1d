"""A reward model behind a server on loopback: what it is asked, and what of its replies is a score."""

import asyncio
import json

import pyarrow as pa
import pytest
from aiohttp import web
from pydantic import SecretStr
from transformers import BertConfig
from transformers import BertForSequenceClassification as Bert

from rdpo.config import EndpointReward, Job
from rdpo.errors import EndpointDown, InputError
from rdpo.files.unfinished import UNFINISHED
from rdpo.preference.calibration import tried_rewards
from rdpo.preference.rewards.classifier import Classifier
from rdpo.preference.rewards.endpoint import EndpointKind, ServedReward
from rdpo.stages.checks import models_by_kind
from tests.support.chat_server import QUICK, Server
from tests.support.classifiers import PROMPT, classifier
from tests.support.crash_counts import NoCrashCounts
from tests.support.models import byte_tokenizer, save_model

SYSTEM = [{"role": "system", "content": "Be kind."}, *PROMPT]
REPLIES = {
    "classify": lambda value: {"data": [{"index": 0, "label": None, "probs": [value], "num_classes": 1}]},
    "pooling": lambda value: {"data": [{"index": 0, "data": [value]}]},
    "score": lambda value: {"data": [{"index": 0, "score": value}]},
}


class Scorer(Server):
    """Scores by the length of what it is asked, -0.5 of it with an activation; plays a list of replies before."""

    def __init__(self, *replies, heeds_activation=True):
        super().__init__(*replies)
        self.heeds = heeds_activation
        self.routes = {path: self.scored for path in ("/classify", "/pooling", "/score", "/mine")}

    async def scored(self, request):
        body = await request.json()
        if "items" in body:
            good = {"scores": [float(len(item["answer"])) for item in body["items"]]}
        else:
            text = body.get("text_2") or body.get("input") or body["messages"][-1]["content"]
            value = len(text) * (-0.5 if body["use_activation"] and self.heeds else 1)
            good = REPLIES[request.path[1:]](value)
        if self.replies and not body.get("use_activation"):
            return await self.answer(request)
        self.asked.append(body)
        self.keys.append(request.headers.get("Authorization"))
        return web.json_response(good)


def reward(**changes):
    return EndpointReward.model_validate(
        {"kind": "endpoint", "name": "rm", "api": "classify", "url": "http://rm:8000"} | changes
    )


async def scored(server, job_table, rows, answers, **changes):
    async with server.running() as address:
        settings = {"url": address + changes.pop("path", ""), **QUICK, "retries": 1, **changes}
        actor = ServedReward(
            reward(**settings), answers, Job.model_validate(job_table), NoCrashCounts, SecretStr("geheim")
        )
        rows = [{"prompt_id": str(number), "prompt": SYSTEM, **row} for number, row in enumerate(rows)]
        return [row async for block in actor(pa.Table.from_pylist(rows)) for row in block.to_pylist()]


def score(server, job_table, *rows, answers=("a",), **changes):
    return asyncio.run(scored(server, job_table, rows or [{"a": "four"}], list(answers), **changes))


def ended(row):
    return json.loads(row[UNFINISHED])


@pytest.mark.parametrize("api", ["classify", "pooling", "score"])
@pytest.mark.parametrize("path", ["", "/", "/v1"])
def test_vllms_routes_give_the_heads_output_without_an_activation(job_table, api, path):
    server = Scorer()
    (row,) = score(server, job_table, {"a": "four", "b": "sixsix"}, answers="ab", api=api, path=path, model="rm")
    assert (row["a_scores"], row["b_scores"]) == ({"rm": 4.0}, {"rm": 6.0})
    # The first two see whether an activation is left out when that is asked for.
    assert [asked["use_activation"] for asked in server.asked] == [False, True, False, False]
    assert {asked["model"] for asked in server.asked} == {"rm"}


def test_what_the_server_renders(job_table):
    bodies = {}
    for api in ("classify", "pooling", "score"):
        server = Scorer()
        score(server, job_table, api=api)
        bodies[api] = server.asked[-1]
    messages = [*SYSTEM, {"role": "assistant", "content": "four"}]
    assert bodies["classify"] == {"use_activation": False, "messages": messages}
    assert bodies["pooling"] == {"use_activation": False, "messages": messages, "task": "classify"}
    pair = {"text_1": "system: Be kind.\n\nuser: why?", "text_2": "four"}
    assert bodies["score"] == {"use_activation": False, **pair}

    server = Scorer()
    score(server, job_table, answer_only=True)
    assert server.asked[-1] == {"use_activation": False, "input": "four"}


@pytest.mark.parametrize("answer_only", [False, True])
def test_with_a_tokenizer_the_tokens_are_those_that_the_classifier_reads(job_table, tiny_classifier, answer_only):
    server, settings = Scorer(), {"answer_only": answer_only, "max_length": 32}
    score(server, job_table, {"a": "four"}, {"a": "rain " * 20}, tokenizer=tiny_classifier, **settings)
    local = Classifier(classifier(tiny_classifier, **settings), ["a"])
    asked = [body["input"] for body in server.asked[2:]]
    for ids, answer in zip(sorted(asked, key=len), ("four", "rain " * 20), strict=True):
        read = local.input_ids(SYSTEM, answer)["input_ids"]
        # Its head stands on the last token that is no padding, the engine's on the last one.
        assert ids == read[: len(ids)] and set(read[len(ids) :]) <= {local.pad_id}
        assert len(read) <= 32


def test_answers_to_one_prompt_come_to_a_server_of_the_users_in_one_request(job_table):
    server = Scorer()
    rows = [{"a": "four", "b": "sixsix"}, {"a": "x", "b": ""}]
    first, second = score(server, job_table, *rows, answers="ab", api="json", path="/mine", key_variable="RM_KEY")
    assert (first["a_scores"], first["b_scores"]) == ({"rm": 4.0}, {"rm": 6.0})
    assert (second["a_scores"], second["b_scores"]) == ({"rm": 1.0}, {"rm": 0.0})
    items = [{"prompt": SYSTEM, "answer": answer} for answer in ("four", "sixsix")]
    assert server.asked[0] == {"items": items}
    assert server.keys == ["Bearer geheim"] * 2

    server = Scorer()
    score(server, job_table, api="json", path="/mine", answer_only=True, model="mine")
    assert server.asked == [{"model": "mine", "items": [{"answer": "four"}]}]


@pytest.mark.parametrize("reply", [{}, [], {"scores": 3}, {"scores": [1.0]}, {"scores": [1.0, 2.0, 3.0]}, "{broken"])
def test_a_reply_of_another_form_is_asked_for_again(job_table, reply):
    server = Scorer(json.dumps(reply) if reply != "{broken" else reply)
    (row,) = score(server, job_table, {"a": "x", "b": "y"}, answers="ab", api="json", path="/mine")
    assert (row["dropped"], row["a_scores"], len(server.asked)) == (None, {"rm": 1.0}, 2)


@pytest.mark.parametrize("value", [None, "7", True, [1.0], 10**400])
def test_a_score_that_is_no_number_drops_its_row(job_table, value):
    (row,) = score(Scorer({"scores": [value]}), job_table, api="json", path="/mine")
    assert row["dropped"] == "reward rm: score of a is not a finite number"


def test_several_outputs_are_refused(job_table):
    reply = {"data": [{"probs": [0.1, 0.9]}]}
    (row,) = score(Scorer(*[reply] * 9), job_table)
    name, said = ended(row)
    assert name == "InputError"
    assert "gives 2 numbers for an answer; a reward has one" in said


def test_numbers_for_each_token_are_no_score(job_table):
    reply = {"data": [{"data": [[0.1], [0.9]]}]}
    (row,) = score(Scorer(*[reply] * 9), job_table, api="pooling")
    assert row["dropped"] == (
        "reward rm: the endpoint gives a number for each token; /pooling is to give one for the conversation"
    )


def test_a_server_that_may_give_probabilities_for_outputs_is_refused(job_table):
    class Sigmoid(Scorer):
        async def scored(self, request):
            self.asked.append(await request.json())
            return web.json_response(REPLIES["classify"](0.7))

    server = Sigmoid()
    rows = score(server, job_table, {"a": "x"}, {"a": "y"})
    assert {ended(row)[0] for row in rows} == {"InputError"}
    assert "so this may be a probability; set activation = true to take it as it is" in ended(rows[0])[1]
    assert len(server.asked) == 2
    (row,) = score(Sigmoid(), job_table, activation=True)
    assert row["a_scores"] == {"rm": 0.7}
    # A head that has none gives the same, and no probability.
    (row,) = score(Scorer(heeds_activation=False), job_table)
    assert row["a_scores"] == {"rm": 4.0}


@pytest.mark.parametrize(
    ("fault", "end", "said"),
    [
        (401, InputError, "rewards.rm: http"),
        (404, InputError, "correct `url`, `api` or `model`"),
        (403, InputError, "refuses every request, a harmless one too (403)"),
        (429, EndpointDown, "2 attempts ended with (429)"),
        (503, EndpointDown, "the same command resumes"),
        ("cut", EndpointDown, "APIConnectionError"),
        ("slow", EndpointDown, "APITimeoutError"),
    ],
)
@pytest.mark.parametrize("api", ["classify", "json"])
def test_what_ends_the_server_loses_no_row(job_table, api, fault, end, said):
    changes = {"timeout_s": 0.2} if fault == "slow" else {}
    server = Scorer(*[fault] * 40)
    rows = score(server, job_table, {"a": "x"}, {"a": "y"}, api=api, path="/mine" if api == "json" else "", **changes)
    assert [ended(row)[0] for row in rows] == [end.__name__] * 2
    assert said in ended(rows[0])[1]
    assert "geheim" not in ended(rows[0])[1]


def test_a_row_that_is_refused_alone_is_dropped_and_a_fault_is_asked_again(job_table):
    good = {"scores": [1.0]}
    server = Scorer(good, 500, good, 400, good, good)
    rows = score(server, job_table, *[{"a": text} for text in "wxyz"], api="json", path="/mine", concurrency=1)
    assert [(row["dropped"] or "")[:42] for row in rows] == ["", "", "reward rm: the endpoint refuses it (400): ", ""]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api": "score", "tokenizer": "a/b"}, 'tokenizer: api = "score" takes texts'),
        ({"api": "json", "tokenizer": "a/b"}, 'tokenizer: api = "json" takes texts'),
        ({"max_length": 99}, "max_length: the server cuts what it renders"),
        ({"api": "score", "answer_only": True}, 'answer_only: api = "score" takes prompt and answer'),
        ({"api": "json", "activation": True}, 'activation: with api = "json" the server alone decides'),
        ({"url": "http://user:geheim@rm"}, "url"),
        ({"api": "chat"}, "api"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        reward(**changes)


def test_key_and_tokenizer_are_looked_at_before_the_run(job_table, monkeypatch, tmp_path):
    job = Job.model_validate(job_table)
    monkeypatch.delenv("RM_KEY", raising=False)
    with pytest.raises(InputError, match=r"rewards.rm.key_variable: RM_KEY is not set"):
        EndpointKind(reward(key_variable="RM_KEY")).check(job)
    with pytest.raises(InputError, match="no/where"):
        EndpointKind(reward(tokenizer=str(tmp_path / "no/where"))).check(job)

    tokenizer = byte_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    folder = save_model(tmp_path, Bert(config), tokenizer)
    with pytest.raises(InputError, match=r"BertForSequenceClassification, which does not read token ids alone; remove"):
        EndpointKind(reward(tokenizer=folder)).check(job)


def test_how_the_server_is_asked_makes_no_score_again(job_table, tiny_classifier, tiny_model):
    job = Job.model_validate(job_table)

    def settings(**changes):
        return EndpointKind(reward(**changes)).settings(job)

    asked = {"retries": 9, "requests_per_minute": 5, "timeout_s": 3, "concurrency": 2, "key_variable": "RM_KEY"}
    assert settings() == settings(**asked)
    others = [{"url": "http://other"}, {"model": "m"}, {"api": "pooling"}, {"answer_only": True}, {"activation": True}]
    assert all(settings(**changes) != settings() for changes in [*others, {"tokenizer": tiny_classifier}])


def test_a_server_takes_no_pool_loads_no_model_and_is_tried_before_the_teacher(job_table):
    table = {"kind": "endpoint", "name": "rm", "url": "http://rm", "api": "classify", "model": "served/name"}
    job = Job.model_validate({**job_table, "rewards": [table]})
    assert EndpointKind(job.rewards[0]).pools(job) == []
    assert tried_rewards(job) == job.rewards
    assert not any(models_by_kind(job).values())


@pytest.mark.parametrize(
    ("api", "replies", "said"),
    [
        ("json", [401], "refuses the key in key_variable"),
        ("json", [404], "correct `url`, `api` or `model`"),
        ("classify", [{"data": [{"probs": [0.1, 0.9]}]}], "gives 2 numbers for an answer; a reward has one"),
        ("pooling", [403] * 4, "refuses every request, a harmless one too"),
    ],
)
def test_a_server_that_cannot_be_asked_like_this_is_said_before_the_run(job_table, api, replies, said):
    server = Scorer(*replies)
    with server.elsewhere() as address, pytest.raises(InputError, match=r"rewards\.rm") as refusal:
        url = f"{address}/mine" if api == "json" else address
        EndpointKind(reward(url=url, api=api)).check(Job.model_validate(job_table))
    assert said in str(refusal.value)


@pytest.mark.parametrize("reply", [{"scores": [1.0]}, {"scores": [None]}, {}, 503, "cut"])
def test_a_server_that_is_not_there_yet_is_no_fault_before_the_run(job_table, reply):
    with Scorer(*[reply] * 3).elsewhere() as address:
        EndpointKind(reward(url=f"{address}/mine", api="json")).check(Job.model_validate(job_table))
