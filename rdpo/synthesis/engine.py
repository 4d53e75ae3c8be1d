"""One vLLM engine in one Ray actor: token ids in, text out.

The engine is given token ids, never text, so that the chat template is applied once and in one
place. It is ended on purpose when its actor is released; a dead engine ends its process, so that
Ray replaces the actor and does its rows again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rdpo.config import Engine as EngineSettings
from rdpo.config import Sampling
from rdpo.policy.hardware import available_cores, compute_dtype

if TYPE_CHECKING:
    import ray.data

CPU_BATCHED_TOKENS = 4096


@dataclass(frozen=True)
class Generation:
    """One answer: its text, how it ended (`stop` or `length`), and its number of tokens."""

    text: str
    finish_reason: str
    tokens: int
    logprobs: dict[int, float] | None = None
    prompt_tokens: int = 0


class ContextError(ValueError):
    """The conversation leaves no room for an answer in the engine's context."""


class Engine:
    """An asynchronous vLLM engine for one model at a time."""

    def __init__(self, folder: str, settings: EngineSettings, seed: int):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if settings.gpus == 0:
            os.environ.update(_cpu_environment(settings))
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments: dict[str, Any] = {
            "model": folder,
            "dtype": compute_dtype(settings.dtype, settings.gpus > 0),
            "max_model_len": settings.max_model_len,
            "tensor_parallel_size": max(1, settings.gpus),
            "enable_prefix_caching": True,
            "seed": seed,
            "generation_config": "vllm",
            "disable_log_stats": True,
            **({} if settings.gpus else _cpu_arguments(settings)),
            **settings.options,
        }
        self.max_model_len = settings.max_model_len
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self.folder = folder
        self._requests = self._users = 0
        self._turn = asyncio.Condition()

    @asynccontextmanager
    async def holding(self, folder: str) -> AsyncIterator[None]:
        """Within this context the engine has the weights of `folder`, which has the same architecture.

        Those who want other weights wait until nobody uses the present ones. Loading takes seconds
        where a new engine takes half a minute.
        """
        async with self._turn:
            await self._turn.wait_for(lambda: self.folder == folder or not self._users)
            if self.folder != folder:
                await self._load(folder)
            self._users += 1
        try:
            yield
        finally:
            async with self._turn:
                self._users -= 1
                self._turn.notify_all()

    async def _load(self, folder: str) -> None:
        await self.engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        await self.engine.reset_prefix_cache()
        self.folder = folder

    async def generate(
        self, prompt_ids: list[int], sampling: Sampling, seed: int, stop_ids: tuple[int, ...], **extra: Any
    ) -> Generation:
        """Sample one answer to a prompt of token ids.

        Raises:
            ContextError: the prompt fills the context.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        room = self.max_model_len - len(prompt_ids)
        if room < 1:
            raise ContextError(f"conversation of {len(prompt_ids)} tokens fills engine.max_model_len")
        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=min(sampling.max_tokens, room),
            seed=seed,
            stop_token_ids=list(stop_ids),
            output_kind=RequestOutputKind.FINAL_ONLY,
            **extra,
        )
        self._requests += 1
        prompt = TokensPrompt(prompt_token_ids=prompt_ids)
        final: Any = None
        try:
            async for output in self.engine.generate(prompt, parameters, request_id=str(self._requests)):
                final = output.outputs[0]
        except Exception:
            self._leave_if_dead()
            raise
        logprobs = final.logprobs[0] if final.logprobs else None
        return Generation(
            final.text,
            "length" if final.finish_reason == "length" else "stop",
            len(final.token_ids),
            {token: entry.logprob for token, entry in logprobs.items()} if logprobs else None,
            len(prompt_ids),
        )

    def _leave_if_dead(self) -> None:
        if self.engine.errored:
            os._exit(1)

    def shutdown(self) -> None:
        """End the engine's process and give its memory back."""
        self.engine.shutdown()


def _cpu_environment(settings: EngineSettings) -> dict[str, str]:
    """Memory and cores of an engine on the CPU; a lone engine is bound to its cores, which is quicker."""
    cores = available_cores()[: settings.cpus]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(settings.kv_cache_gib))),
        "OMP_NUM_THREADS": str(len(cores)),
    }
    if settings.concurrency == 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    return environment


def _cpu_arguments(settings: EngineSettings) -> dict[str, Any]:
    """What vLLM's CPU build needs.

    A prompt is never prefilled in pieces: vLLM 0.32 rewinds the random generator of a piece, which
    a CPU generator cannot do ("CPU Generator does not use offset"), and the engine would die.
    """
    return {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(settings.max_model_len, CPU_BATCHED_TOKENS),
    }


def engine_pool(
    rows: ray.data.Dataset, actor: type, settings: EngineSettings, arguments: dict[str, Any]
) -> ray.data.Dataset:
    """Stream rows through a pool of engine actors, several blocks at a time in each engine."""
    from ray.data import ActorPoolStrategy

    blocks = rows.repartition(target_num_rows_per_block=settings.batch_rows)
    return blocks.map_batches(
        actor,
        fn_constructor_kwargs=arguments,
        batch_format="pyarrow",
        batch_size=settings.batch_rows,
        compute=ActorPoolStrategy(size=settings.concurrency, max_tasks_in_flight_per_actor=settings.batches_in_flight),
        num_cpus=settings.cpus or 1,
        num_gpus=settings.gpus,
        max_concurrency=settings.batches_in_flight,
    )


async def gather_rows(coroutines: list[Any]) -> list[Any]:
    """Await all rows of a block together; they share the engine's running batch."""
    return list(await asyncio.gather(*coroutines))
