"""The policy's log-probs on a GPU: packed equals padded, and both equal the CPU's in float32."""

import random

import pytest
import torch

from rdpo.config import Lora
from rdpo.modeling.model import ForwardSettings, Tuning, as_policy
from tests.support.models import tiny_config

pytestmark = pytest.mark.gpu


def model_of(tokenizer, **changes):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    return LlamaForCausalLM(tiny_config(tokenizer, **{**shape, "num_key_value_heads": 2, **changes}))


def batches(seed=0, pairs=12):
    draw = random.Random(seed)

    def tokens(most):
        return [draw.randint(1, 250) for _ in range(draw.randint(1, most))]

    return tuple([tokens(most) for _ in range(pairs)] for most in (200, 90, 90))


def log_probs(model, dtype, device, layout, columns):
    policy = as_policy(model.to(dtype), ForwardSettings("float32", 256, layout)).to(device).eval()
    with torch.no_grad():
        return policy(policy.batch(*columns).to(device)).cpu()


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_float32_on_the_gpu_equals_the_cpu(tokenizer, layout):
    torch.backends.cuda.matmul.allow_tf32 = False
    columns = batches()
    expected = log_probs(model_of(tokenizer), torch.float32, "cpu", "padded", columns)
    actual = log_probs(model_of(tokenizer), torch.float32, "cuda", layout, columns)
    torch.testing.assert_close(actual, expected, atol=5e-3, rtol=1e-4)


def test_bfloat16_packed_is_as_near_to_float32_as_padded(tokenizer):
    columns = batches()
    exact = log_probs(model_of(tokenizer), torch.float32, "cpu", "padded", columns)
    packed, padded = (
        (log_probs(model_of(tokenizer), torch.bfloat16, "cuda", layout, columns) - exact).abs().mean()
        for layout in ("packed", "padded")
    )
    assert packed < max(2 * padded, 0.1)


def test_adapters_have_the_models_precision_and_train(tokenizer):
    policy = as_policy(
        model_of(tokenizer).to(torch.bfloat16), ForwardSettings("bfloat16", 256, "packed"), Tuning(Lora(rank=4), True)
    ).to("cuda")
    adapters = [weight for weight in policy.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in adapters} == {torch.bfloat16}
    policy(policy.batch(*batches()).to("cuda")).sum().backward()
    assert sum(weight.grad.abs().sum() > 0 for weight in adapters) >= len(adapters) // 2


def test_compiled_layers_are_as_near_to_float32_as_others_and_compiled_once(tokenizer):
    """Values by batches of several lengths, among them those that were not there when it was compiled."""
    from torch._dynamo.utils import counters

    exact = [log_probs(model_of(tokenizer), torch.float32, "cpu", "padded", batches(seed)) for seed in range(3)]
    errors = {}
    for compiled in (False, True):
        policy = as_policy(model_of(tokenizer).to(torch.bfloat16), ForwardSettings("bfloat16", 256, "packed")).to(
            "cuda"
        )
        if compiled:
            counters.clear()
            policy.compile_layers()
        found = [policy(policy.batch(*batches(seed)).to("cuda")) for seed in range(3)]
        sum(logps.sum() for logps in found).backward()
        off = [(logps.detach().cpu() - expected).abs().mean() for logps, expected in zip(found, exact, strict=True)]
        errors[compiled] = max(off)
    assert errors[True] < max(2 * errors[False], 0.1)
    assert 0 < counters["stats"]["unique_graphs"] <= 6
