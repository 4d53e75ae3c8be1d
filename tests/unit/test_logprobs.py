"""The one forward against the plain way: all logits, a full softmax."""

import pytest
import torch

from rdpo.config import Lora
from rdpo.policy.logprobs import token_logps
from rdpo.policy.model import load_policy
from rdpo.policy.packing import collate

PROMPTS = [[5, 6, 7, 8], [9, 10]]
COMPLETIONS = [[11, 12, 13], [14, 15, 16, 17, 1]]


def naive_logps(model, prompt, completion):
    ids = torch.tensor([[*prompt, *completion]])
    logps = torch.log_softmax(model(input_ids=ids).logits.float(), -1)[0, len(prompt) - 1 : -1]
    return logps.gather(1, torch.tensor(completion)[:, None]).sum()


@pytest.fixture
def policy(tiny_model):
    return load_policy(tiny_model, "float32", chunk=3).eval()


def test_chunked_equals_full_softmax_in_value_and_gradient():
    torch.manual_seed(0)
    hidden = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(8, 29, bias=False, dtype=torch.float64)
    labels, weights = torch.randint(29, (11,)), torch.randn(11, dtype=torch.float64)
    whole = torch.log_softmax(head(hidden), -1).gather(1, labels[:, None])[:, 0]
    expected = torch.autograd.grad((whole * weights).sum(), [hidden, head.weight])
    chunked = token_logps(hidden, labels, head, chunk=4, softcap=None)
    actual = torch.autograd.grad((chunked * weights).sum(), [hidden, head.weight])
    torch.testing.assert_close(chunked, whole, check_dtype=False, atol=1e-5, rtol=1e-5)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_policy_equals_plain_transformers(policy):
    expected = [naive_logps(policy.model, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    actual = policy(collate(PROMPTS, COMPLETIONS))
    torch.testing.assert_close(actual, torch.stack(expected), atol=1e-4, rtol=1e-5)


def test_gradients_equal_plain_transformers(policy):
    policy(collate(PROMPTS, COMPLETIONS)).sum().backward()
    actual = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    policy.zero_grad()
    sum(naive_logps(policy.model, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)).backward()
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, atol=1e-4, rtol=1e-3)


def test_adapter_off_is_the_base_model(tiny_model, policy):
    adapted = load_policy(tiny_model, "float32", 8, Lora(rank=4)).eval()
    batch = collate(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(adapted(batch), policy(batch))
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(adapted(batch), policy(batch), atol=0.1)
    with adapted.as_reference():
        torch.testing.assert_close(adapted(batch), policy(batch))
