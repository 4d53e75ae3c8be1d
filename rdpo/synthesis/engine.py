"""One vLLM engine in one Ray actor: token ids in, text out.

The engine is given token ids, never text, so that the chat template is applied once and in one
place. It is ended on purpose when its actor is released; a dead engine ends its process, so that
Ray replaces the actor and does its rows again.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rdpo.cluster.hardware import available_cores, compute_dtype, computed_dtype
from rdpo.config import Engine as EngineSettings
from rdpo.config import Sampling, largest
from rdpo.modeling.weights import ModelRef
from rdpo.synthesis.lookup import lookup_arguments
from rdpo.tracking.trace import span

if TYPE_CHECKING:
    from psutil import Process
    from vllm import RequestOutput, SamplingParams, TokensPrompt

T = TypeVar("T")

CPU_BATCHED_TOKENS = 4096
GPU_BATCHED_TOKENS = 8192
"""Tokens of one forward of an engine on GPUs; vLLM's own choice inside a program, 2048, leaves a large GPU idle."""
GPU_SEQUENCES = 256
"""Sequences that an engine on GPUs has in a forward at least; vLLM's own choice inside a program is 128 or 256."""
ENGINE_PROCESS = "VLLM::"
WORKER_OPTIONS = {"distributed_executor_backend", "tensor_parallel_size", "pipeline_parallel_size", "worker_cls"}
"""Options of vLLM's by which an engine has workers of its own."""
ENDS_WITHIN_S = 20.0
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Generation:
    """One answer: its text, how it ended (`stop` or `length`), its number of tokens.

    Of the `prompt_tokens` of the conversation before it, `cached_tokens` were found in the prefix cache.
    """

    text: str
    finish_reason: str
    tokens: int
    logprobs: dict[int, float] | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    """The tokens as they were drawn, with the one that ended the answer, and with the reasoning before it."""
    reasoning: str = ""
    """What was thought before the answer; of it `tokens` counts the tokens too."""
    drawn: tuple[int, ...] = ()
    """The answer's tokens with those of its first words, which were given, and without the one that ended it; nothing
    where the student's tokenizer has others."""


class EngineError(ValueError):
    """One request that the engine will not answer; the others are answered."""


class ContextError(EngineError):
    """The conversation leaves no room for an answer in the engine's context."""


def engine_settings(engine: EngineSettings, model: ModelRef) -> dict[str, Any]:
    """What the texts of an engine with this model depend on, beside the model's weights."""
    found = {**engine.model_dump(), **computed_dtype(engine.dtype, engine.gpus)}
    if engine.options.get("trust_remote_code"):
        # A student that is trusted anyway has this in its own settings.
        found["engine_code"] = model._replace(trust=True).code_fingerprint()
    return found


RESETS, RESET_PAUSE_S = 100, 0.1
"""How often a prefix cache is asked to be empty before other weights are loaded, and the seconds between."""


class Engine:
    """An asynchronous vLLM engine for one model at a time, perhaps with the LoRA adapter of a folder on it."""

    def __init__(self, folder: str, settings: EngineSettings, seed: int, adapter: str | None = None, **own: Any):
        """Start the engine; `own`: arguments of vLLM's that its user needs, whatever the job says."""
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # vLLM reads these as it is imported.
        os.environ.update(engine_environment(settings))
        with span("vLLM is imported"):
            from vllm import AsyncEngineArgs
            from vllm.lora.request import LoRARequest
            from vllm.v1.engine.async_llm import AsyncLLM

        arguments = {
            **engine_arguments(folder, settings, seed),
            **(_adapter_arguments(adapter) if adapter else {}),
            **settings.options,
            **own,
        }
        self.max_model_len = settings.max_model_len
        with span("engine starts"):
            self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self.folder = folder
        self.adapter = LoRARequest("adapter", 1, adapter) if adapter else None
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
        # What the prefix cache holds was computed with the weights before. vLLM does not empty it while blocks are in
        # use, which those of a request that has just ended may be for a moment.
        for _ in range(RESETS):
            if await self.engine.reset_prefix_cache():
                break
            await asyncio.sleep(RESET_PAUSE_S)
        else:
            raise RuntimeError(f"vLLM does not empty its prefix cache, so the weights of {folder} are not loaded")
        with span("other weights are loaded"):
            await self.engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self.folder = folder

    async def generate(
        self, prompt_ids: list[int], sampling: Sampling, seed: int, stop_ids: tuple[int, ...], **extra: Any
    ) -> Generation:
        """Sample one answer to a prompt of token ids.

        Raises:
            ContextError: the prompt fills the context.
            EngineError: the engine refuses the request.
        """
        from vllm import SamplingParams
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
            **sampling.used,
            # Else every token is a message from the engine's process.
            output_kind=RequestOutputKind.FINAL_ONLY,
            **extra,
        )
        final = await self._final(prompt_ids, parameters)
        answer = final.outputs[0]
        logprobs = answer.logprobs[0] if answer.logprobs else None
        return Generation(
            answer.text,
            "length" if answer.finish_reason == "length" else "stop",
            len(answer.token_ids),
            {token: entry.logprob for token, entry in logprobs.items()} if logprobs else None,
            len(prompt_ids),
            final.num_cached_tokens or 0,
            tuple(answer.token_ids),
        )

    async def outputs(self, ids: list[int]) -> list[float]:
        """The outputs of a reward model's head, without an activation; of an engine with `runner="pooling"`.

        Raises:
            EngineError: the engine refuses the request.
        """
        from vllm import PoolingParams

        pooling = PoolingParams(task="classify", use_activation=False)
        final = await self._last(lambda prompt, name: self.engine.encode(prompt, pooling, name), ids)
        values: list[float] = final.outputs.data.float().tolist()
        return values

    async def _final(self, prompt_ids: list[int], parameters: SamplingParams) -> RequestOutput:
        def generate(prompt: TokensPrompt, name: str) -> AsyncIterator[RequestOutput]:
            found: AsyncIterator[RequestOutput] = self.engine.generate(
                prompt, parameters, name, lora_request=self.adapter
            )
            return found

        return await self._last(generate, prompt_ids)

    async def _last(self, ask: Callable[[TokensPrompt, str], AsyncIterator[T]], ids: list[int]) -> T:
        """The last output of a request."""
        from vllm import TokensPrompt

        self._requests += 1
        # vLLM tells requests apart by their names, and would mix two of the same.
        prompt, name = TokensPrompt(prompt_token_ids=ids), str(self._requests)
        final: Any = None
        try:
            async for output in ask(prompt, name):
                final = output
        except Exception as error:
            self._leave_if_dead()
            raise EngineError(f"the engine refuses it: {type(error).__name__}: {error}") from error
        found: T = final
        return found

    def _leave_if_dead(self) -> None:
        # Ray takes an actor whose process ends for dead, and makes a new one; an exception would only fail these rows.
        if self.engine.errored:
            os._exit(1)

    def shutdown(self) -> None:
        """End the engine's processes and give their memory back; one that does not end is killed."""
        import psutil

        # Looked for before: those of an engine that has ended are not found under this process any more.
        children = [child for child in psutil.Process().children(recursive=True) if _is_engine(child)]
        with span("engine ends"):
            self.engine.shutdown()
        for child in psutil.wait_procs(children, timeout=ENDS_WITHIN_S)[1]:
            child.kill()


def _is_engine(process: Process) -> bool:
    import psutil

    try:
        return str(process.name()).startswith(ENGINE_PROCESS)
    except psutil.Error:
        return False


def _adapter_arguments(adapter: str) -> dict[str, Any]:
    """What vLLM needs to know of an adapter before it is loaded."""
    rank = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(size for size in LORA_RANKS if size >= rank)}


def engine_arguments(folder: str, settings: EngineSettings, seed: int) -> dict[str, Any]:
    """What vLLM is given for a model, before `settings.options`."""
    return {
        "model": folder,
        "dtype": compute_dtype(settings.dtype, settings.gpus > 0),
        "max_model_len": settings.max_model_len,
        "tensor_parallel_size": max(1, settings.gpus // settings.pipeline_parallel),
        "pipeline_parallel_size": settings.pipeline_parallel,
        "enable_prefix_caching": True,
        "seed": seed,
        # Not what the model's folder says of sampling: the job says it all.
        "generation_config": "vllm",
        "disable_log_stats": True,
        **lookup_arguments(settings),
        **(_gpu_arguments(settings) if settings.gpus else _cpu_arguments(settings)),
    }


def engine_environment(settings: EngineSettings) -> dict[str, str]:
    """What vLLM reads from the environment of an engine's process."""
    if not settings.gpus:
        return _cpu_environment(settings)
    # The sampler would be compiled at the first start and never used: every request has a seed of its own.
    return {"VLLM_USE_FLASHINFER_SAMPLER": os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0")}


def _cpu_environment(settings: EngineSettings) -> dict[str, str]:
    """Memory, cores and processes of an engine on the CPU; a lone engine's worker is bound to its cores."""
    cores = available_cores()[: settings.cpus]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(settings.kv_cache_gib))),
        "OMP_NUM_THREADS": str(len(cores)),
    }
    if _is_one_process(settings):
        # Else vLLM's CPU build starts a worker beside the engine's process, whatever its executor is said to be.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    elif largest(settings.concurrency) == 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    return environment


def _is_one_process(settings: EngineSettings) -> bool:
    """Whether an engine on the CPU computes in the process that schedules: no option asks for workers of their own."""
    return not WORKER_OPTIONS & set(settings.options)


def _cpu_arguments(settings: EngineSettings) -> dict[str, Any]:
    """What vLLM's CPU build needs.

    A prompt is never prefilled in pieces: vLLM 0.32 rewinds the random generator of a piece, which
    a CPU generator cannot do ("CPU Generator does not use offset"), and the engine would die.

    It computes in the engine's own process. vLLM prefers a worker beside it, which reads OpenMP's variables anew; here
    they are set before the engine starts, and the worker would cost six seconds of imports and 6% of the tokens.
    """
    return {
        **({"distributed_executor_backend": "uni"} if _is_one_process(settings) else {}),
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(settings.max_model_len, CPU_BATCHED_TOKENS),
    }


def _gpu_arguments(settings: EngineSettings) -> dict[str, Any]:
    """How much an engine on GPUs takes at a time: all rows that the pool sends it, and long prompts in few forwards."""
    return {
        "max_num_seqs": max(GPU_SEQUENCES, settings.rows_in_flight),
        "max_num_batched_tokens": GPU_BATCHED_TOKENS,
    }
