"""The endpoint teacher against a server on loopback that behaves, and one that does not."""

import json
import time

import pytest
from aiohttp import web

from rdpo.config import Endpoint as Settings
from rdpo.config import Job, load_job
from rdpo.errors import InputError
from rdpo.stages import synthesis
from rdpo.synthesis.endpoint import EndpointDown, Unanswered, check_endpoint, cost, endpoint_key
from tests.support.chat_server import Server, ask, completion
from tests.support.jobs import write_job


def test_answer_with_counts_and_the_key_in_the_header():
    server = Server(completion("good", "length"))
    (answer,) = ask(server)
    assert (answer.text, answer.finish_reason, answer.tokens, answer.prompt_tokens) == ("good", "length", 3, 7)
    asked = server.asked[0]
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("m", 5, 0.7)
    assert asked["seed"] == 11
    assert server.keys == ["Bearer geheim"]
    assert not {"stop", "top_k", "min_p", "presence_penalty"} & asked.keys()


def test_what_openai_has_no_word_for_is_asked_as_vllms_server_knows_it():
    server = Server(completion())
    ask(server, sampling={"top_k": 5, "min_p": 0.1, "stop": ["END"], "presence_penalty": 0.5})
    asked = server.asked[0]
    assert (asked["top_k"], asked["min_p"], asked["stop"], asked["presence_penalty"]) == (5, 0.1, ["END"], 0.5)


@pytest.mark.parametrize(
    "reply",
    [
        completion("An apple.", reasoning_content="Hm."),
        completion("An apple.", reasoning="Hm."),
        completion("<think>\nHm.\n</think>\n\nAn apple."),
    ],
)
def test_reasoning_of_a_server_is_told_from_its_answer(reply):
    server = Server(reply)
    [answer] = ask(server, reasons=True, sampling={"max_reasoning_tokens": 40}, arguments={"enable_thinking": True})
    assert (answer.text, answer.reasoning) == ("An apple.", "Hm.")
    assert server.asked[0]["max_tokens"] == 45
    assert server.asked[0]["chat_template_kwargs"] == {"enable_thinking": True}


def test_a_server_that_is_not_asked_for_reasoning_gets_no_word_of_it():
    server = Server(completion("<think>Hm.</think>An apple."))
    [answer] = ask(server)
    assert (answer.text, answer.reasoning) == ("<think>Hm.</think>An apple.", "")
    assert server.asked[0]["max_tokens"] == 5
    assert not {"chat_template_kwargs", "max_reasoning_tokens"} & server.asked[0].keys()


def test_an_answer_of_a_server_that_ends_inside_its_reasoning_drops_the_row():
    [error] = ask(Server(completion("<think>Hm", "length")), reasons=True)
    assert isinstance(error, Unanswered)
    assert "inside its reasoning" in str(error)


@pytest.mark.parametrize(
    "fault",
    [429, 500, 503, "cut", "slow", "{not json", "[]", json.dumps({"choices": []}), '{"choices": {}}', completion(None)],
)
def test_a_fault_is_asked_again(fault):
    server = Server(fault, fault)
    # More attempts than faults: a connection may fail that never came to the server.
    (answer,) = ask(server, retries=5)
    assert answer.text == "fine"
    assert len(server.asked) == 3


@pytest.mark.parametrize("fault", [500, "{not json"])
def test_a_row_that_breaks_a_server_which_answers_others_is_dropped(fault):
    server = Server(completion(), fault, fault, fault)
    first, second, third = ask(server, "good", "poison", "good", concurrency=1)
    assert isinstance(second, Unanswered)
    assert "the endpoint failed each time" in str(second)
    assert (first.text, third.text) == ("fine", "fine")


@pytest.mark.parametrize("fault", [503, 429, "cut"])
def test_a_server_that_answers_nothing_any_more_ends_the_run_and_loses_no_row(fault):
    server = Server(completion(), *[fault] * 40)
    answers = ask(server, *"abcd", concurrency=1)
    assert [type(answer) for answer in answers[1:]] == [EndpointDown] * 3
    assert "the same command resumes" in str(answers[1])


def test_a_refused_request_is_not_asked_again():
    server = Server(400)
    (error,) = ask(server)
    assert isinstance(error, Unanswered)
    assert "refuses it (400)" in str(error)
    assert [asked["messages"][0]["content"] for asked in server.asked] == ["hi", "Say hello."]


@pytest.mark.parametrize("status", [400, 403, 422])
def test_a_server_that_refuses_all_ends_the_run_at_once_and_loses_no_row(status):
    server = Server(*[status] * 40)
    answers = ask(server, *"abcdefgh", concurrency=4)
    assert [type(answer) for answer in answers] == [InputError] * 8
    assert "refuses every request" in str(answers[0]) and "rows stay to be done" in str(answers[0])
    assert len(server.asked) == 2


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_an_account_that_ends_in_the_middle_drops_no_row(status, concurrency):
    server = Server(completion(), completion(), *[status] * 40)
    answers = ask(server, *"abcdefgh", concurrency=concurrency)
    assert sum(isinstance(answer, InputError) for answer in answers) == 6
    assert len(server.asked) <= 2 + concurrency + 1


def test_a_quota_that_is_used_up_is_not_waited_for():
    class UsedUp(Server):
        async def answer(self, request):
            if len(self.asked) < 1:
                return await super().answer(request)
            self.asked.append(await request.json())
            body = {"error": {"message": "pay", "code": "insufficient_quota", "type": "insufficient_quota"}}
            return web.json_response(body, status=429)

    server = UsedUp()
    answers = ask(server, *"abc", concurrency=1)
    assert [type(answer) for answer in answers[1:]] == [InputError] * 2
    assert "the quota" in str(answers[1]) and len(server.asked) == 2


def test_reasoning_models_get_their_limit_under_its_other_name():
    server = Server()
    ask(server, token_limit="max_completion_tokens")
    assert server.asked[0]["max_completion_tokens"] == 5 and "max_tokens" not in server.asked[0]


@pytest.mark.parametrize("reply", [completion("", "content_filter"), completion(None, "length")])
def test_an_answer_that_is_withheld_or_has_no_text_drops_the_row_at_once(reply):
    server = Server(reply)
    (error,) = ask(server)
    assert isinstance(error, Unanswered)
    assert len(server.asked) == 1


@pytest.mark.parametrize(("status", "message"), [(401, "refuses the key in TEACHER_KEY"), (404, "does not know 'm'")])
def test_a_wrong_key_or_model_ends_the_run(status, message):
    (error,) = ask(Server(status), key_variable="TEACHER_KEY")
    assert isinstance(error, InputError)
    assert message in str(error)
    assert "geheim" not in str(error)


def test_a_single_forbidden_prompt_drops_its_row():
    answers = ask(Server(completion(), 403), "good", "bad", concurrency=1)
    assert isinstance(answers[1], Unanswered)


def test_no_more_requests_at_once_than_allowed():
    server = Server()
    server.delay = 0.05
    ask(server, *"abcdefgh", concurrency=3)
    assert server.most == 3


def test_requests_begin_at_the_rate_that_is_allowed():
    began = time.monotonic()
    ask(Server(500, 500), *"abcd", requests_per_minute=600)
    assert time.monotonic() - began >= 0.5


def test_key_comes_from_the_environment_and_is_not_shown(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "geheim")
    key = endpoint_key(Settings(url="http://t/v1", model="m", key_variable="TEACHER_KEY"))
    assert key.get_secret_value() == "geheim"
    assert "geheim" not in repr(key)


@pytest.mark.parametrize("url", ["http://user:geheim@host/v1", "https://host/v1?api_key=geheim"])
def test_a_key_in_the_url_is_refused_and_not_shown(job_table, tmp_path, url):
    job_table["synthesis"]["endpoint"] = {"url": url, "model": "m"}
    with pytest.raises(InputError, match=r"synthesis.endpoint.url: a URL like") as refusal:
        load_job(write_job(tmp_path / "job.toml", job_table))
    assert "geheim" not in str(refusal.value)


def test_a_key_that_is_not_set_is_found_before_the_run(monkeypatch):
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(InputError, match="TEACHER_KEY is not set"):
        check_endpoint(Settings(url="http://t/v1", model="m", key_variable="TEACHER_KEY"))


def test_how_the_endpoint_is_asked_does_not_make_the_answers_again(job_table):
    keys = []
    for settings in ({}, {"retries": 9, "requests_per_minute": 5, "timeout_s": 3}, {"model": "other"}):
        job_table["synthesis"]["endpoint"] = {"url": "http://t/v1", "model": "m", **settings}
        keys.append(synthesis.settings(Job.model_validate(job_table)))
    assert keys[0] == keys[1] != keys[2]


def test_cost():
    assert cost(150, 15, (2.0, 10.0)) == (150 * 2 + 15 * 10) / 1e6
