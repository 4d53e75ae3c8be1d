"""A chat completions server on loopback that behaves, or does not, and the endpoint teacher before it."""

import asyncio

from aiohttp import web
from pydantic import SecretStr

from rdpo.config import Endpoint as Settings
from rdpo.config import Sampling
from rdpo.synthesis.endpoint import Endpoint

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
            return web.json_response({"error": {"message": "no"}}, status=reply, headers={"retry-after": "0.02"})
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
        sampling = SAMPLING.model_copy(update=settings.pop("sampling", {}))
        settings = {"pause_s": 0.01, "timeout_s": 1.0, "retries": 2, **settings}
        endpoint = Endpoint(Settings(url=f"http://127.0.0.1:{port}/v1", model="m", **settings), SecretStr("geheim"))
        asked = [endpoint.say([{"role": "user", "content": text}], sampling, 11) for text in conversations]
        try:
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await runner.cleanup()


def ask(server, *conversations, **settings):
    return asyncio.run(server.ask(*(conversations or ("hi",)), **settings))
