"""Compiled decoder layers: the same values and gradients, and one compilation for all lengths."""

import pytest
import torch
from pydantic import ValidationError
from torch._dynamo.utils import counters

from rdpo.config import Job, Lora
from rdpo.modeling.model import ForwardSettings, Tuning, as_policy

SHAPES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def policy_of(kind, layout="packed", **tuning):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPES))
    return as_policy(model, ForwardSettings("float32", 64, layout), Tuning(**tuning)).train()


def texts(draw, count):
    lengths = torch.randint(3, 20, (count,), generator=draw).tolist()
    return [torch.randint(3, 96, (length,), generator=draw).tolist() for length in lengths]


def steps(policy):
    """Values and gradients of forwards over one to three prompts of other lengths each."""
    draw, found = torch.Generator().manual_seed(1), []
    for count in (1, 2, 3, 1, 2, 3):
        policy.zero_grad()
        logps = policy(policy.batch(texts(draw, count), texts(draw, count), texts(draw, count)))
        logps.square().sum().backward()
        gradients = [weight.grad.clone() for weight in policy.parameters() if weight.grad is not None]
        found.append((logps.detach(), gradients))
    return found


def same(ours, theirs):
    for (logps, gradients), (their_logps, their_gradients) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(logps, their_logps, rtol=1e-5, atol=1e-5)
        for gradient, other in zip(gradients, their_gradients, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-3)


@pytest.fixture(autouse=True)
def afresh():
    """What other tests have compiled is forgotten, and what these have."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "layout"), [("llama", "packed"), ("llama", "padded"), ("qwen3", "packed"), ("gemma2", "packed")]
)
def test_they_are_compiled_once_whatever_comes(kind, layout):
    """A batch of one prompt may have a variant of its own, as sizes of 1 have; nothing else may."""
    policy = policy_of(kind, layout)
    expected = steps(policy)
    policy.compile_layers("aot_eager")
    same(steps(policy), expected)
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 12
    same(steps(policy), expected)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.long
def test_adapters_and_recomputed_activations_go_with_it():
    """By the compiler that training uses, which needs one for C++ on a CPU."""
    tuning = {"lora": Lora(rank=4), "gradient_checkpointing": True}
    policy = policy_of("llama", **tuning)
    # A fresh adapter leaves the model as it is, and one half of it without a gradient.
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    expected = steps(policy)
    policy.compile_layers()
    same(steps(policy), expected)
    assert counters["stats"]["unique_graphs"] > 0


def test_zero_3_is_refused(job_table):
    job_table["training"] |= {"compile_layers": True, "zero_stage": 3}
    with pytest.raises(ValidationError, match="compile_layers: with zero_stage 3 the weights of a layer are gathered"):
        Job.model_validate(job_table)
