"""What vLLM is given: an engine takes all the rows that its pool sends it."""

from rdpo.config import Engine
from rdpo.config.models import Endpoint
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


def test_a_server_is_asked_as_many_rows_as_it_takes_whatever_the_engine_section_says():
    pool = client_pool(Engine(gpus=8), Endpoint(url="http://teacher/v1", model="m", concurrency=100))
    assert (pool.gpus, pool.rows_in_block) == (0, 16)
    assert pool.rows_in_flight >= 200
