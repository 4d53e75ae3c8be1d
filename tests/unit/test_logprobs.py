"""The chunked head against all logits and a full softmax, in value and gradient."""

import pytest
import torch

from rdpo.modeling.logprobs import CompletionHead
from tests.support.tensors import LargestTensor


def full(hidden, output, labels, scale, softcap):
    logits = output(hidden) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.5, None, True), (2.0, 1.5, True)])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunked_equals_full_softmax_in_value_and_gradient(chunk, scale, softcap, bias):
    torch.manual_seed(0)
    hidden = torch.randn(11, 8, requires_grad=True)
    output = torch.nn.Linear(8, 29, bias=bias)
    labels, weights = torch.randint(29, (11,)), torch.randn(11)
    expected = full(hidden, output, labels, scale, softcap)
    actual = CompletionHead(output, chunk, scale, softcap)(hidden, labels)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    inputs = [hidden, *output.parameters()]
    by_autograd = torch.autograd.grad((expected * weights).sum(), inputs)
    by_chunk = torch.autograd.grad((actual * weights).sum(), inputs)
    for one, other in zip(by_chunk, by_autograd, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.5, None, True), (2.0, 1.5, True)])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_squares_are_those_of_the_full_softmax_and_change_nothing_else(chunk, scale, softcap, bias):
    torch.manual_seed(0)
    hidden, output = torch.randn(11, 8, requires_grad=True), torch.nn.Linear(8, 29, bias=bias)
    labels, weights = torch.randint(29, (11,)), torch.randn(11)
    logits = output(hidden) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = torch.softmax(logits.double(), -1).square().sum(-1).log()

    head = CompletionHead(output, chunk, scale, softcap)
    plain = head(hidden, labels)
    logps, log_squares = head(hidden, labels, squares=True)
    torch.testing.assert_close(log_squares.double(), expected, atol=1e-5, rtol=1e-5)
    assert not log_squares.requires_grad
    assert torch.equal(logps, plain)

    inputs = [hidden, *output.parameters()]
    without = torch.autograd.grad((plain * weights).sum(), inputs)
    beside = torch.autograd.grad((logps * weights).sum(), inputs)
    assert all(torch.equal(one, other) for one, other in zip(beside, without, strict=True))


def test_squares_that_nobody_asks_for_are_not_computed():
    hidden, output = torch.randn(12, 8), torch.nn.Linear(8, 29, bias=False)
    counts = []
    for squares in (False, True):
        with Operations() as made:
            CompletionHead(output, 4)(hidden, torch.zeros(12, dtype=torch.long), squares=squares)
        counts.append(made.names.count("aten.logsumexp.default"))
    # One for each of the three chunks; the second one is that of twice the logits.
    assert counts == [3, 6]


def test_squares_hold_no_more_logits_at_a_time():
    tokens, vocabulary, chunk = 64, 4000, 8
    hidden, output = torch.randn(tokens, 4, requires_grad=True), torch.nn.Linear(4, vocabulary, bias=False)
    largest = LargestTensor()
    with largest:
        CompletionHead(output, chunk)(hidden, torch.zeros(tokens, dtype=torch.long), squares=True)[0].sum().backward()
    assert largest.elements <= max(chunk * vocabulary, output.weight.numel())


def test_frozen_head_gives_a_gradient_to_its_input_alone():
    hidden, output = torch.randn(5, 8, requires_grad=True), torch.nn.Linear(8, 29, bias=False).requires_grad_(False)
    CompletionHead(output, 2)(hidden, torch.arange(5)).sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert output.weight.grad is None


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.5, None, True), (2.0, 1.5, True)])
def test_a_frozen_head_gives_the_gradient_of_a_trained_one(scale, softcap, bias, squares):
    torch.manual_seed(0)
    hidden, output = torch.randn(11, 8, requires_grad=True), torch.nn.Linear(8, 29, bias=bias)
    labels, weights = torch.randint(29, (11,)), torch.randn(11)

    found = []
    for frozen in (False, True):
        output.requires_grad_(not frozen)
        logps = CompletionHead(output, 4, scale, softcap)(hidden, labels, squares)
        logps, *log_squares = logps if squares else (logps,)
        found.append([logps, *log_squares, *torch.autograd.grad((logps * weights).sum(), [hidden])])
    trained, frozen = found
    assert torch.equal(trained[0], frozen[0])
    for one, other in zip(trained, frozen, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_a_frozen_head_is_multiplied_with_twice_and_a_trained_one_four_times():
    """Forward, and by the states; where it is trained, forward once more, and by the weights."""
    counts = []
    for trained in (False, True):
        hidden, output = torch.randn(12, 8, requires_grad=True), torch.nn.Linear(8, 29, bias=False)
        output.requires_grad_(trained)
        with Operations() as made:
            CompletionHead(output, 12)(hidden, torch.zeros(12, dtype=torch.long)).sum().backward()
        counts.append(sum(name.startswith(("aten.mm", "aten.addmm")) for name in made.names))
    assert counts == [2, 4]


def test_a_frozen_head_keeps_as_much_as_its_hidden_states():
    hidden, output = torch.randn(64, 4, requires_grad=True), torch.nn.Linear(4, 4000, bias=False).requires_grad_(False)
    largest, kept = LargestTensor(), []

    def noted(tensor):
        kept.append(tensor.numel())
        return tensor

    with largest, torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        CompletionHead(output, 8)(hidden, torch.zeros(64, dtype=torch.long)).sum().backward()
    assert largest.elements <= 8 * 4000
    assert sum(kept) == hidden.numel()


def test_bf16_is_summed_in_fp32():
    torch.manual_seed(0)
    hidden, output = torch.randn(64, 32).bfloat16(), torch.nn.Linear(32, 5000, bias=False).bfloat16()
    labels = torch.randint(5000, (64,))
    exact = torch.log_softmax(output(hidden).double(), -1).gather(1, labels[:, None])[:, 0]
    actual = CompletionHead(output, 16)(hidden, labels)
    assert actual.dtype == torch.float32
    assert (actual - exact).abs().max() < 1e-4


def test_logits_of_all_tokens_are_never_held():
    """The largest tensor of forward and backward is a chunk's logits, not (tokens x vocabulary)."""
    tokens, vocabulary, chunk = 64, 4000, 8
    hidden, output = torch.randn(tokens, 4, requires_grad=True), torch.nn.Linear(4, vocabulary, bias=False)
    largest = LargestTensor()
    with largest:
        CompletionHead(output, chunk)(hidden, torch.zeros(tokens, dtype=torch.long)).sum().backward()
    assert largest.elements <= max(chunk * vocabulary, output.weight.numel())


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))
