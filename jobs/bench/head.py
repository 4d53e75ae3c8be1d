"""From hidden states to log-probs and back through the output layer: seconds and memory of each way.

python jobs/bench/head.py [--tokens 2048] [--hidden 576] [--vocabulary 49152] [--dtype float32] [--device cuda]

`plain`: all logits and a softmax; `torch`: its chunked linear_cross_entropy; `liger`, `cce`: the fused kernels of
liger-kernel and cut-cross-entropy, on a GPU where they are installed; `rdpo`, and `compiled` as with
`training.compile_layers`. Each with the layer trained and frozen, as under adapters. On a CPU the seconds are those of
its one thread, so that other work hardly counts, and the memory is that of all tensors made beyond the gradients.
`off` is the largest difference of a log-prob from `plain`, and of the hidden states' gradient as a share of its largest
number.
"""

import argparse
import time
from functools import partial
from importlib.util import find_spec

import torch
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy

from rdpo.modeling.logprobs import CompletionHead
from rdpo.planning.memory import GIB, Memory

CHUNK = 1024
ROUNDS = 4


def plain(hidden, weight, labels):
    """All logits."""
    return -cross_entropy(linear(hidden, weight).float(), labels, reduction="none")


def by_torch(hidden, weight, labels):
    """In chunks, by torch."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -linear_cross_entropy(hidden, weight, labels, reduction="none", options=options)


def by_liger(hidden, weight, labels):
    """By liger-kernel."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="none")


def by_cce(hidden, weight, labels):
    """By cut-cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy as cut

    return -cut(hidden, weight, labels, reduction="none")


def by_rdpo(hidden, weight, labels, compiled):
    """By rdpo, a chunk at a time."""
    output = torch.nn.Linear(1, 1, bias=False)
    output.weight = weight
    head = CompletionHead(output, CHUNK)
    if compiled:
        head.compile_chunks()
    return head(hidden, labels)


def ways(device):
    """By name, those that can be had here."""
    found = {"plain": plain}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        found["torch"] = by_torch
    if device == "cuda" and find_spec("liger_kernel"):
        found["liger"] = by_liger
    if device == "cuda" and find_spec("cut_cross_entropy"):
        found["cce"] = by_cce
    return found | {"rdpo": partial(by_rdpo, compiled=False), "compiled": partial(by_rdpo, compiled=True)}


def once(way, hidden, weight, labels):
    """Log-probs, and the gradient of the hidden states under weights that differ by token."""
    hidden.grad = weight.grad = None
    logps = way(hidden, weight, labels)
    (logps * torch.linspace(-1, 1, len(labels), device=logps.device)).sum().backward()
    return logps.detach(), hidden.grad


def seconds(way, *inputs):
    """Median of some rounds, after one that compiles."""
    cuda, taken = inputs[0].is_cuda, []
    clock = time.perf_counter if cuda else time.process_time
    for _ in range(ROUNDS):
        began = clock()
        once(way, *inputs)
        if cuda:
            torch.cuda.synchronize()
        taken.append(clock() - began)
    return sorted(taken[1:])[len(taken[1:]) // 2]


def gibibytes(way, hidden, weight, labels):
    """Most memory at a time, beyond inputs and their gradients."""
    if hidden.is_cuda:
        hidden.grad, weight.grad = torch.empty_like(hidden), torch.empty_like(weight)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(way, hidden, weight, labels)
        return (torch.cuda.max_memory_allocated() - before) / GIB
    with Memory([hidden, weight, labels]) as memory:
        once(way, hidden, weight, labels)
    gradients = sum(one.nbytes for one in (hidden, weight) if one.requires_grad)
    return max(memory.peak - gradients, 0) / GIB


def main():
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)

    print(f"{options.tokens} tokens, {options.hidden} x {options.vocabulary}, {options.dtype}, {options.device}")
    print(f"{'layer':<8} {'way':<9} {'seconds':>8} {'of plain':>9} {'GiB':>6} {'off':>17}")
    for trained in (True, False):
        made = {"device": options.device, "dtype": dtype}
        hidden = torch.randn(options.tokens, options.hidden, **made).requires_grad_()
        weight = torch.randn(options.vocabulary, options.hidden, **made).div_(options.hidden**0.5)
        weight = torch.nn.Parameter(weight, requires_grad=trained)
        inputs = (hidden, weight, torch.randint(options.vocabulary, (options.tokens,), device=options.device))
        expected = once(plain, *inputs)
        base = None
        for name, way in ways(options.device).items():
            logps, gradient = once(way, *inputs)
            off = (logps - expected[0]).abs().max(), (gradient - expected[1]).abs().max() / expected[1].abs().max()
            taken, held = seconds(way, *inputs), gibibytes(way, *inputs)
            # `plain` is the first.
            base = base or taken
            print(
                f"{'trained' if trained else 'frozen':<8} {name:<9} {taken:8.4f} {taken / base:9.2f} {held:6.3f} "
                f"{off[0]:8.1e} {off[1]:8.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
