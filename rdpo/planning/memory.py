"""Memory of one training worker before anything is loaded: weights and optimizer by count, activations by rehearsal.

The forward and backward of one full micro-batch run on tensors without storage (torch's fake tensors), and
every allocation and release is counted; so the figure follows the architecture, the layout, the chunked head,
adapters and gradient checkpointing without a formula for any of them. Attention is rehearsed as on the CPU, or, for
training on GPUs, as what FlashAttention keeps for its backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from rdpo.config import Job, smallest
from rdpo.modeling.attention import flash_by_sequence, sequences
from rdpo.modeling.flops import Arithmetic
from rdpo.modeling.layout import PackedRow
from rdpo.modeling.model import Policy, as_policy
from rdpo.modeling.packing import PairSize, batch_tokens, epoch_steps, plan_step
from rdpo.modeling.student import forward_settings, student_dtype, tuning_of
from rdpo.modeling.weights import ModelRef
from rdpo.preference.pairs import scored_answers
from rdpo.training.backend import Weights, backend_of
from rdpo.training.loop import step_pairs

GIB = 1 << 30
FOOTPRINT = "rdpo_footprint"
CPU_PROCESS = int(1.0 * GIB)
"""Python with torch, transformers, DeepSpeed and Ray, resident."""
GPU_PROCESS = int(1.5 * GIB)
"""CUDA context and NCCL's buffers."""
NF4_BYTES = 4.127 / 8
"""A weight in four bits, with its share of the doubly quantised scales (arXiv 2305.14314, section 3)."""
CPU_SLACK = 0.6
"""What the C library keeps of the activations' memory beyond what is live (fitted, jobs/bench/RESULTS.md)."""


@dataclass(frozen=True)
class Rehearsal:
    """What a model needs, whatever the number of workers: weights in all and trained, bytes of one micro-batch.

    `layer` is how many trained weights its largest decoder layer has, `stashed` the bytes of one micro-batch that lie
    in CPU memory between forward and backward.
    """

    weights: int
    trained: int
    layer: int
    activations: int
    arithmetic: Arithmetic
    packed: bool
    stashed: int = 0


def typical_size(job: Job) -> PairSize:
    """A pair of three equal parts that takes as many positions as its longest sequence may, so that batches fill.

    A group has the same prompt, and as many answers of that length as the job's task gives it.
    """
    part = job.reference.max_length // 3
    others = len(scored_answers(job)) - 2 if job.pairs.others else 0
    return PairSize(job.reference.max_length - 2 * part, part, part, (part,) * others)


def rehearse(job: Job, sizes: Sequence[PairSize] = ()) -> Rehearsal:
    """Run the heaviest micro-batch of the job's student on fake tensors.

    Args:
        job: the job.
        sizes: of its pairs, where they are known; else all are taken to be as long as the job admits.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AttentionInterface, AutoModelForCausalLM

    student = ModelRef.student(job)
    config, dtype = student.config(), getattr(torch, student_dtype(job))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=student.trust)
        policy = as_policy(model, forward_settings(job), tuning_of(job))

    for weight in policy.parameters():
        # peft leaves adapters on the meta device in float32; those of a model that is loaded have its precision.
        if weight.requires_grad:
            weight.data = weight.data.to(model.dtype)
    if job.training.gpus_per_worker and policy.packed:
        AttentionInterface.register(FOOTPRINT, _footprint)
        model.set_attn_implementation(FOOTPRINT)
    stash = _Stash()
    if job.training.offload_activations and job.training.gpus_per_worker:
        policy.stash = stash.hooks

    # A fake tensor has a shape and a device, but no memory: what is counted below would not fit here.
    with FakeTensorMode():
        _pretend_on_cpu(policy)
        peak = _step_peak(policy, heaviest(job, sizes or [typical_size(job)] * job.training.batch_size, policy.packed))

    parameters, decoder = list(policy.parameters()), tuple(policy.layer_types())
    return Rehearsal(
        weights=sum(one.numel() for one in parameters),
        trained=_trained(policy),
        layer=max((_trained(one) for one in policy.modules() if isinstance(one, decoder)), default=0),
        activations=peak,
        arithmetic=Arithmetic.of(policy),
        packed=policy.packed,
        stashed=stash.size,
    )


def _trained(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)


class _FlashFootprint(torch.autograd.Function):
    """Tensors of the sizes that FlashAttention makes and keeps: its sides, its output, a float32 for each score row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:2], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(side) for side in ctx.saved_tensors[:3])


def _footprint(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    row: PackedRow,
    **_: object,
) -> tuple[Tensor, None]:
    """Packed attention on a GPU, without its arithmetic; as transformers calls it."""

    def kernel(queries: Tensor, keys: Tensor, values: Tensor, *_: object, **__: object) -> Tensor:
        output: Tensor = _FlashFootprint.apply(queries, keys, values)  # type: ignore[no-untyped-call]
        return output

    placed = sequences(row.spans, query.device)
    return flash_by_sequence(query, key, value, placed, scaling=None, window=None, kernel=kernel), None


class _Stash:
    """In place of CPU memory beside a GPU: of tensors that are put there only the sizes are kept."""

    size = 0

    def hooks(self) -> AbstractContextManager[object]:
        """The context in which what is kept for the backward pass is put there."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        self.size += tensor.numel() * tensor.dtype.itemsize
        return tensor.shape, tensor.dtype

    def _unpack(self, packed: tuple[torch.Size, torch.dtype]) -> Tensor:
        shape, dtype = packed
        return torch.empty(shape, dtype=dtype, device="cpu")


def _pretend_on_cpu(policy: Policy) -> None:
    """Give a model on the meta device weights with fake storage; tied weights stay tied."""
    weights = {id(one): torch.nn.Parameter(_like(one), one.requires_grad) for one in policy.parameters()}
    for module in policy.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else weights[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else _like(buffer)
    policy.train()


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def heaviest(job: Job, sizes: Sequence[PairSize], packed: bool) -> list[PairSize]:
    """The micro-batch with the most positions among those of the first epoch."""
    training = job.training
    workers = smallest(training.num_workers)
    steps = islice(step_pairs(len(sizes), job), epoch_steps(len(sizes), training.batch_size))
    plans = (plan_step(pairs, sizes, workers, training.tokens_per_batch, packed) for pairs in steps)
    micros = chain.from_iterable(chain.from_iterable(plans))
    sizes_of = (list(map(sizes.__getitem__, micro.pairs)) for micro in micros)
    return max(sizes_of, key=lambda pairs: batch_tokens(pairs, packed), default=list(sizes[:1]))


def _step_peak(policy: Policy, pairs: Sequence[PairSize]) -> int:
    """Most bytes that forward and backward of a micro-batch hold beyond weights and their gradients."""
    prompts = [[0] * pair.prompt for pair in pairs]
    chosen = [[0] * pair.chosen for pair in pairs]
    rejected = [[0] * pair.rejected for pair in pairs]
    others = [[[0] * answer for answer in pair.others] for pair in pairs]
    batch = policy.batch(prompts, chosen, rejected, others=others)

    held = [*policy.parameters(), *policy.buffers()]
    for weight in policy.parameters():
        # Gradients are counted apart, for ZeRO spreads them over the workers.
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(_forget_gradient)
    with Memory(held) as memory:
        policy(batch).sum().backward()
    peak: int = memory.peak
    return peak


def _forget_gradient(weight: Tensor) -> None:
    weight.grad = None


class Memory(TorchDispatchMode):
    """Bytes of all tensors made in its context, as they are now and at most."""

    def __init__(self, held: list[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()
        for tensor in held:
            self.known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it made."""
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # A view shares its storage, and is no new memory.
        if storage in self.known:
            return
        self.known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


def worker_memory(job: Job, rehearsal: Rehearsal) -> dict[str, int]:
    """Bytes by part that one of the job's training workers holds at its fullest, on its device."""
    gpu = job.training.gpus_per_worker > 0
    weights = _weights(job, rehearsal)
    return {
        "process": GPU_PROCESS if gpu else CPU_PROCESS,
        **backend_of(job).memory_parts(job, weights),
        "activations and head": rehearsal.activations,
        "allocator": 0 if gpu else int(rehearsal.activations * CPU_SLACK),
    }


def offloaded_memory(job: Job, rehearsal: Rehearsal) -> dict[str, int]:
    """Bytes by part that one of the job's training workers holds in CPU memory in place of its GPU's."""
    parts = backend_of(job).offloaded_parts(job, _weights(job, rehearsal))
    return {**parts, "activations": rehearsal.stashed} if rehearsal.stashed else parts


def _weights(job: Job, rehearsal: Rehearsal) -> Weights:
    size = _weight_bytes(job, rehearsal, getattr(torch, student_dtype(job)))
    return Weights(rehearsal.weights, rehearsal.trained, size, rehearsal.layer)


def _weight_bytes(job: Job, rehearsal: Rehearsal, dtype: torch.dtype) -> int:
    if job.student.quantization == "none":
        return rehearsal.weights * dtype.itemsize
    frozen = rehearsal.arithmetic.layers
    return int(frozen * NF4_BYTES) + (rehearsal.weights - frozen) * dtype.itemsize
