"""The endpoint teacher against a server on loopback that behaves, and one that does not."""

import asyncio
import json
import time

import pytest
from aiohttp import web
from pydantic import SecretStr

from rdpo.config import Endpoint as Settings
from rdpo.config import Sampling
from rdpo.errors import InputError
from rdpo.synthesis.endpoint import Endpoint, EndpointDown, Unanswered, endpoint_cost, endpoint_key

SAMPLING = Sampling(max_tokens=5)


def completion(text="fine", finish_reason="stop"):
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}},
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


class Server:
    """Plays a list of replies, then answers well; keeps what it was asked, and how many at once."""

    def __init__(self, *replies):
        self.replies, self.asked, self.keys = list(replies), [], []
        self.now = self.most = 0
        self.delay = 0.0

    async def answer(self, request):
        self.asked.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.delay)
        self.now -= 1
        reply = self.replies.pop(0) if self.replies else completion()
        if reply == "cut":
            request.transport.close()
            return web.Response()
        if reply == "slow":
            await asyncio.sleep(3)
        if isinstance(reply, int):
            return web.json_response({"error": {"message": "no"}}, status=reply, headers={"retry-after-ms": "10"})
        if isinstance(reply, dict):
            return web.json_response(reply)
        return web.Response(text=reply, content_type="application/json")

    async def ask(self, *conversations, **settings):
        """What an endpoint says to the conversations, or the error."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        settings = {"pause_s": 0.01, "timeout_s": 1.0, "retries": 2, **settings}
        endpoint = Endpoint(Settings(url=f"http://127.0.0.1:{port}/v1", model="m", **settings), SecretStr("geheim"))
        asked = [endpoint.say([{"role": "user", "content": text}], SAMPLING, 11) for text in conversations]
        try:
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await runner.cleanup()


def ask(server, *conversations, **settings):
    return asyncio.run(server.ask(*(conversations or ("hi",)), **settings))


def test_answer_with_counts_and_the_key_in_the_header():
    server = Server(completion("good", "length"))
    (answer,) = ask(server)
    assert (answer.text, answer.finish_reason, answer.tokens, answer.prompt_tokens) == ("good", "length", 3, 7)
    asked = server.asked[0]
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("m", 5, 0.7)
    assert asked["seed"] == 11
    assert server.keys == ["Bearer geheim"]


@pytest.mark.parametrize(
    "fault", [429, 500, 503, "cut", "slow", "{not json", "[]", json.dumps({"choices": []}), completion(None)]
)
def test_a_fault_is_asked_again(fault):
    server = Server(fault, fault)
    (answer,) = ask(server)
    assert answer.text == "fine"
    assert len(server.asked) == 3


@pytest.mark.parametrize("fault", [500, "{not json"])
def test_a_row_that_fails_each_time_is_dropped_and_the_others_go_on(fault):
    server = Server(fault, fault, fault)
    first, second = ask(server, "poison", "good", concurrency=1)
    assert isinstance(first, Unanswered)
    assert "the endpoint failed" in str(first)
    assert second.text == "fine"


def test_a_refused_request_is_not_asked_again():
    server = Server(400)
    (error,) = ask(server)
    assert isinstance(error, Unanswered)
    assert "refuses it (400)" in str(error)
    assert len(server.asked) == 1


def test_a_withheld_answer_drops_the_row():
    (error,) = ask(Server(completion("", "content_filter")))
    assert isinstance(error, Unanswered)


@pytest.mark.parametrize(
    ("status", "message"), [(401, "refuses the key in OPENAI_API_KEY"), (404, "does not know 'm'")]
)
def test_a_wrong_key_or_model_ends_the_run(status, message):
    (error,) = ask(Server(status))
    assert isinstance(error, InputError)
    assert message in str(error)
    assert "geheim" not in str(error)


def test_a_server_that_is_gone_ends_the_run():
    errors = ask(Server(*[500] * 40), *"abcd", retries=0, failures_in_a_row=3, concurrency=1)
    assert [type(error) for error in errors] == [Unanswered, Unanswered, EndpointDown, EndpointDown]


def test_no_more_requests_at_once_than_allowed():
    server = Server()
    server.delay = 0.05
    ask(server, *"abcdefgh", concurrency=3)
    assert server.most == 3


def test_requests_begin_at_the_rate_that_is_allowed():
    began = time.monotonic()
    ask(Server(), *"abcdef", requests_per_minute=600)
    assert time.monotonic() - began >= 0.5


def test_key_comes_from_the_environment_and_is_not_shown(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "geheim")
    key = endpoint_key(Settings(url="http://t/v1", model="m", key_variable="TEACHER_KEY"))
    assert key.get_secret_value() == "geheim"
    assert "geheim" not in repr(key)


def test_a_key_in_the_url_is_refused():
    with pytest.raises(ValueError, match="url"):
        Settings(url="http://user:key@host/v1", model="m")


def test_cost():
    rows = [{"response_tokens": 10, "response_prompt_length": 100, "revision_tokens": 5, "revision_prompt_length": 50}]
    cost = endpoint_cost(rows, (2.0, 10.0))
    assert cost == {"tokens_read": 150, "tokens_written": 15, "cost": (150 * 2 + 15 * 10) / 1e6}
