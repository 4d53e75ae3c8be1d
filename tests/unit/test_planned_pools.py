"""Memory of every pool of a job, and of workers of models that no device holds, against figures made by hand."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Qwen2Config

from rdpo.config import Job, load_job
from rdpo.modeling.weights import ModelRef
from rdpo.planning.memory import GIB, offloaded_memory, rehearse, worker_memory
from rdpo.planning.pools import Shape, pool_memory, pool_table, shape_of
from rdpo.stages.pools import pools_of
from tests.support.jobs import valid_job
from tests.support.models import tiny_config

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072, "dtype": "bfloat16"}
QWEN = {"vocab_size": 152064, "num_key_value_heads": 8, "dtype": "bfloat16"}
SHAPES = {
    "8b": LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA),
    "32b": Qwen2Config(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40, **QWEN),
    "70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA
    ),
}
"""Architectures of Llama 3.1 8B and 70B, and of Qwen2.5 32B, by their published sizes."""


@pytest.fixture(scope="module")
def large(tmp_path_factory, tokenizer):
    """Folders with a configuration and a tokenizer, and no weights."""
    found = {}
    for name, config in SHAPES.items():
        folder = tmp_path_factory.mktemp(name)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[name] = str(folder)
    return found


def planned(job, large, student, *overrides):
    """A job of the repository with models that are here, and no judge."""
    models = [f"student.model={large[student]}", f"synthesis.teacher={large['8b']}"]
    scored = f'rewards=[{{kind="classifier", name="sky", model="{large["8b"]}", gpus=1}}]'
    return load_job(f"jobs/{job}.toml", [*models, scored, *overrides])


def gib(parts):
    return sum(parts.values()) / GIB


def test_shapes_are_those_of_the_models(tiny_model, tokenizer, large):
    shape = shape_of(ModelRef(tiny_model))
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    assert shape.elements == sum(weight.numel() for weight in model.parameters())
    assert shape.weights("float32") == 4 * shape.elements
    head = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1))
    assert shape_of(ModelRef(tiny_model), classifier=True).elements > 0.9 * sum(
        weight.numel() for weight in head.parameters()
    )
    # 131,072 bytes a token: 32 layers of 8 key heads and 8 value heads of 128 numbers of 2 bytes.
    eight = shape_of(ModelRef(large["8b"]))
    assert eight.elements == 8_030_261_248
    assert eight.token("bfloat16", 1) == 131_072
    assert eight.token("bfloat16", 16) == 131_072 / 8


def test_what_is_stored_in_fewer_bits_is_counted_so(large, tmp_path, tokenizer):
    config = SHAPES["8b"].to_dict() | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    LlamaConfig(**config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert shape_of(ModelRef(str(tmp_path))).weights("bfloat16") == 8_030_261_248 // 2


def test_a_forward_is_of_the_size_of_a_rehearsed_one(large):
    """Against torch's own count of a model of two layers on tensors without storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from rdpo.modeling.model import ForwardSettings, as_policy
    from rdpo.modeling.packing import PairSize
    from rdpo.planning.memory import Memory, _pretend_on_cpu

    config = LlamaConfig(**SHAPES["8b"].to_dict() | {"num_hidden_layers": 2})
    with torch.device("meta"):
        policy = as_policy(LlamaForCausalLM(config).to(torch.bfloat16), ForwardSettings("bfloat16", 512))
    pairs = [PairSize(683, 682, 683)] * 2
    prompts, first, second = ([[0] * size] * 2 for size in (683, 682, 683))
    with FakeTensorMode(), torch.no_grad():
        _pretend_on_cpu(policy)
        policy.eval()
        with Memory([*policy.parameters(), *policy.buffers()]) as memory:
            policy(policy.batch(prompts, first, second))
    shape = shape_of(ModelRef(large["8b"]))
    assert shape.forward(sum(pair.packed for pair in pairs), 512, "bfloat16") == pytest.approx(memory.peak, rel=0.35)


@pytest.mark.long
def test_training_takes_what_was_counted_by_hand(large):
    """Hand figures: 8B LoRA on one H100, 8B on eight, 70B offloaded on thirty-two, 32B on eight.

    Of those with all weights, gradients are summed in four bytes: that is 1.9 GiB more for 8B on eight than in two.
    """
    figures = {
        ("safety_1gpu", "8b", 1): 26.7,
        ("safety_nodes", "8b", 8): 24.7 + 1.9,
        ("safety_70b", "70b", 32): 16,
    }
    for (name, student, workers), expected in figures.items():
        job = planned(name, large, student, f"training.num_workers={workers}")
        assert gib(worker_memory(job, rehearse(job))) == pytest.approx(expected, rel=0.2), (name, student)


@pytest.mark.long
def test_32b_does_not_fit_on_eight_and_does_with_its_optimizer_on_the_cpu(large):
    job = planned("safety_nodes", large, "32b", "training.num_workers=8", "training.gpus_per_worker=1")
    rehearsal = rehearse(job)
    assert gib(worker_memory(job, rehearsal)) > 79
    lean = job.model_copy(update={"training": job.training.model_copy(update={"offload": "optimizer"})})
    assert gib(worker_memory(lean, rehearsal)) < 40
    # 20 bytes for each of a worker's weights: float32 copies, two moments, gradients as summed and of the step.
    offloaded = offloaded_memory(lean, rehearsal)
    assert sum(offloaded.values()) == pytest.approx(20 * rehearsal.trained / 8, rel=1e-6)
    assert not set(offloaded) & set(worker_memory(lean, rehearsal))


def memories(job, gpu="H100"):
    return {pool.setting: pool_memory(pool, gpu) for pool in pools_of(job) if pool.holds}


def test_a_reference_that_no_gpu_holds_fits_in_shards(large):
    whole = memories(planned("safety_nodes", large, "70b"))["reference"]
    assert not whole.fits
    assert whole.advice == (
        "reference does not fit: give shards, over which the weights are partitioned, or a smaller tokens_per_batch"
    )
    parted = memories(planned("safety_70b", large, "70b"))["reference"]
    assert parted.fits
    assert not parted.advice
    assert parted.parts["weights"] / GIB == pytest.approx(141.1e9 / GIB / 16, rel=0.01)
    assert 10 < parted.total / GIB < 16


def test_an_engine_keeps_for_its_cache_what_weights_and_forward_leave(large):
    found = memories(planned("safety_nodes", large, "32b"))["evaluation.engine"]
    # 0.92 of 79 GiB, less 61 of weights, about 3.7 of forward, graphs and process, at 256 KiB a token.
    assert found.cache == pytest.approx((72.7 - 61 - 3.7) * GIB / (256 * 1024), rel=0.05)
    assert f"the cache holds {found.cache:,} tokens, so 7 of 256 rows in flight" in found.advice
    small = memories(planned("safety_nodes", large, "32b"), "A10")["evaluation.engine"]
    assert not small.fits
    assert "give gpus that split every layer" in small.advice
    split = planned("safety_nodes", large, "32b", "evaluation.engine.gpus=4")
    assert memories(split)["evaluation.engine"].parts["weights"] == found.parts["weights"] // 4


def test_the_table_has_every_pool_and_says_what_is_not_known(large, tiny_model, tmp_path):
    job = planned("safety_70b", large, "70b")
    lines = list(pool_table(pools_of(job), "H100"))
    named = [line.split()[0] for line in lines[1:]]
    assert named == ["synthesis.engine", "rewards.sky", "reference", "evaluation.engine"]
    assert "GPU, 16 shards" in lines[3]

    table = valid_job(tiny_model, tmp_path)
    table["synthesis"]["teacher"] = str(tmp_path / "none")
    lines = "\n".join(pool_table(pools_of(Job.model_validate(table)), None))
    assert f"synthesis.engine: not known (model {tmp_path / 'none'}: no such folder or file)" in lines
    assert "reference" in lines


def test_a_token_that_is_stored_compressed_takes_its_latent_width():
    shape = Shape(1, None, layers=10, hidden=8, inner=8, vocabulary=8, key_heads=4, head=2, latent=576)
    assert shape.token("bfloat16", 8) == 10 * 576 * 2
