"""A chat completions server on loopback that behaves, or does not, and the endpoint teacher before it."""

import asyncio
import threading
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web
from pydantic import SecretStr

from rdpo.config import Endpoint as Settings
from rdpo.config import Sampling
from rdpo.synthesis.endpoint import Endpoint

SAMPLING = Sampling(max_tokens=5)
QUICK = {"pause_s": 0.01, "timeout_s": 1.0}


def completion(text="fine", finish_reason="stop", **stated):
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **stated}},
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def first_token(logprobs, **more):
    """A completion of one token, with the log-probabilities of the likeliest by their texts; None: it says none."""
    reply = completion("x", "length")
    if logprobs is not None:
        listed = [{"token": token, "logprob": chance, "bytes": None} for token, chance in logprobs.items()]
        content = [{"token": "x", "logprob": -1.0, "bytes": None, "top_logprobs": listed}]
        reply["choices"][0]["logprobs"] = {"content": content, "refusal": None}
    return {**reply, **more}


class Server:
    """Plays a list of replies, then answers well; keeps what it was asked, and how many at once."""

    def __init__(self, *replies):
        self.replies, self.asked, self.keys = list(replies), [], []
        self.routes = {}
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

    @asynccontextmanager
    async def running(self):
        """Its address, while it runs."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.answer)
        for path, handler in self.routes.items():
            app.router.add_post(path, handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        finally:
            await runner.cleanup()

    @contextmanager
    def elsewhere(self):
        """Its address, while it runs in a thread of its own, for askers in other processes."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        running = self.running()
        try:
            yield asyncio.run_coroutine_threadsafe(running.__aenter__(), loop).result()
        finally:
            asyncio.run_coroutine_threadsafe(running.__aexit__(None, None, None), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    async def ask(self, *conversations, **settings):
        """What an endpoint says to the conversations, or the error."""
        sampling = SAMPLING.model_copy(update=settings.pop("sampling", {}))
        also = {"reasons": settings.pop("reasons", False), **settings.pop("arguments", {})}
        settings = {**QUICK, "retries": 2, **settings}
        async with self.running() as address:
            endpoint = Endpoint(Settings(url=f"{address}/v1", model="m", **settings), SecretStr("geheim"))
            asked = [endpoint.say([{"role": "user", "content": text}], sampling, 11, **also) for text in conversations]
            return await asyncio.gather(*asked, return_exceptions=True)


def ask(server, *conversations, **settings):
    return asyncio.run(server.ask(*(conversations or ("hi",)), **settings))
