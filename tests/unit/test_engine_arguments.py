"""What vLLM is given: an engine takes all the rows that its pool sends it; and when it has other weights."""

import asyncio

import pytest

from rdpo.config import Engine
from rdpo.config.models import Endpoint
from rdpo.synthesis import engine as module
from rdpo.synthesis.engine import engine_arguments, engine_environment
from rdpo.synthesis.teacher import client_pool


def test_an_engine_on_a_gpu_takes_all_rows_in_flight_at_once():
    arguments = engine_arguments("model", Engine(gpus=1), 0)
    assert arguments["max_num_seqs"] == Engine(gpus=1).rows_in_flight == 256
    assert arguments["max_num_batched_tokens"] == 8192
    assert "enforce_eager" not in arguments
    assert engine_arguments("model", Engine(gpus=1, batches_in_flight=16), 0)["max_num_seqs"] == 1024
    assert engine_arguments("model", Engine(gpus=1, batch_rows=8), 0)["max_num_seqs"] == 256


def test_a_group_of_gpus_splits_layers_before_it_divides_them():
    arguments = engine_arguments("model", Engine(gpus=8, pipeline_parallel=2), 0)
    assert (arguments["tensor_parallel_size"], arguments["pipeline_parallel_size"]) == (4, 2)


def test_the_sampler_that_is_never_used_is_not_compiled(monkeypatch):
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
    assert engine_environment(Engine(gpus=1)) == {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    assert engine_environment(Engine(gpus=1)) == {"VLLM_USE_FLASHINFER_SAMPLER": "1"}


def test_an_engine_on_the_cpu_prefills_whole_prompts():
    arguments = engine_arguments("model", Engine(max_model_len=8000), 0)
    assert arguments["max_num_batched_tokens"] == 8000
    assert not arguments["enable_chunked_prefill"]
    assert Engine().rows_in_flight == 64


def test_an_engine_on_the_cpu_computes_where_it_schedules_unless_an_option_asks_for_workers():
    alone, asked = Engine(), Engine(options={"tensor_parallel_size": 2})
    assert engine_arguments("model", alone, 0)["distributed_executor_backend"] == "uni"
    # Without the variable, vLLM's CPU build starts a worker in spite of the argument.
    assert engine_environment(alone)["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "distributed_executor_backend" not in engine_arguments("model", asked, 0)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in engine_environment(asked)
    assert "distributed_executor_backend" not in engine_arguments("model", Engine(gpus=1), 0)


def test_a_server_is_asked_as_many_rows_as_it_takes_whatever_the_engine_section_says():
    pool = client_pool(Engine(gpus=8), Endpoint(url="http://teacher/v1", model="m", concurrency=100))
    assert (pool.gpus, pool.rows_in_block) == (0, 16)
    assert pool.rows_in_flight >= 200


class Caching:
    """vLLM's engine, whose prefix cache is in use for so many looks."""

    def __init__(self, in_use):
        self.in_use, self.calls = in_use, []

    async def reset_prefix_cache(self):
        self.in_use -= 1
        self.calls.append("reset" if self.in_use < 0 else "in use")
        return self.in_use < 0

    async def collective_rpc(self, method, kwargs):
        self.calls.append(f"{method} {kwargs['weights_path']}")


def engine_of(vllm):
    one = object.__new__(module.Engine)
    one.engine, one.folder, one._users, one._turn = vllm, "before", 0, asyncio.Condition()
    return one


async def held(engine, folder):
    async with engine.holding(folder):
        return engine.folder


@pytest.mark.parametrize("in_use", [0, 2])
def test_other_weights_are_loaded_once_nothing_of_the_old_ones_is_kept(in_use, monkeypatch):
    monkeypatch.setattr(module, "RESET_PAUSE_S", 0.0)
    vllm = Caching(in_use)
    assert asyncio.run(held(engine_of(vllm), "after")) == "after"
    assert vllm.calls == [*["in use"] * in_use, "reset", "reload_weights after"]


def test_a_cache_that_is_not_emptied_keeps_the_old_weights(monkeypatch):
    monkeypatch.setattr(module, "RESET_PAUSE_S", 0.0)
    vllm = Caching(10**6)
    engine = engine_of(vllm)
    with pytest.raises(RuntimeError, match="does not empty its prefix cache"):
        asyncio.run(held(engine, "after"))
    assert engine.folder == "before" and not engine._users
    assert not [call for call in vllm.calls if call.startswith("reload")]
