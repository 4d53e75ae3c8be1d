"""What training a job will take: memory per worker by part, and tokens per second, before money is spent.

The memory of weights and optimizer is counted and that of a micro-batch rehearsed (`rdpo.planning.memory`). The
rate is the step's FLOPs over the device's peak times a share that trainers of this kind reach; it is a guess
and says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from rdpo.cluster.gpus import GPUS, PER_NODE, Gpu
from rdpo.cluster.hardware import available_cores, worker_cores
from rdpo.config import Job, smallest
from rdpo.errors import InputError
from rdpo.modeling.flops import matmul_rate
from rdpo.modeling.packing import PairSize
from rdpo.modeling.student import student_dtype
from rdpo.planning.communication import bytes_sent, sent
from rdpo.planning.disk import disk
from rdpo.planning.memory import GIB, Rehearsal, offloaded_memory, rehearse, typical_size, worker_memory
from rdpo.planning.pools import pool_table
from rdpo.stages.pools import pools_of
from rdpo.tracking.tables import aligned
from rdpo.training.backend import backend_of

ASSUMED_MFU = 0.4


def plan(
    job: Job, gpu: str | None, workers: int | None, sizes: Sequence[PairSize] = (), network: float | None = None
) -> Iterator[str]:
    """Lines that say what training takes: on the job's own workers, or on so many GPUs of a type.

    Args:
        job: the job.
        gpu: the type, as `GPUS` names it; None is what the job says.
        workers: how many; None is what the job says.
        sizes: of the job's pairs, where they are known.
        network: gigabits a second that a node with eight GPUs takes in from other nodes; None is what clouds give to
            nodes that are made for training.

    Raises:
        InputError: the GPU type is not known, there are more workers than pairs in a step, or the rate is none.
    """
    job, device = _as_planned(job, gpu, workers, network)
    rehearsal = rehearse(job, sizes)
    parts = worker_memory(job, rehearsal)
    yield _headline(job, rehearsal, gpu)
    yield from _memory(parts, GPUS[gpu].memory_gib if gpu else None)
    if offloaded := offloaded_memory(job, rehearsal):
        yield _offloaded(job, offloaded)
    yield from pool_table(pools_of(job), gpu)

    # Of a GPU only the rate of products in bfloat16 is known.
    if (gpu and student_dtype(job) == "bfloat16") or not job.training.gpus_per_worker:
        yield from _speed(job, rehearsal, gpu, sizes or [typical_size(job)])
    if device:
        yield from _network(job, rehearsal, device, sizes or [typical_size(job)])
    yield from disk(job, rehearsal, gpus=bool(gpu))


def _as_planned(job: Job, gpu: str | None, workers: int | None, network: float | None) -> tuple[Job, Gpu | None]:
    """The job with so many workers, and their GPU on its network; None on the CPU, or on GPUs of no named type."""
    if gpu and gpu not in GPUS:
        raise InputError(f"--gpu {gpu}: known are {', '.join(GPUS)}")
    if network is not None and not gpu:
        raise InputError("--network: of what GPUs? give --gpu")
    if network is not None and not 0 < network < math.inf:
        raise InputError(f"--network {network:g}: gigabits a second that a node takes in, above 0")
    workers = smallest(job.training.num_workers) if workers is None else workers
    if workers < 1:
        raise InputError(f"--workers {workers}: at least 1")
    if workers > job.training.batch_size:
        raise InputError(f"--workers {workers}: each needs a pair in a step, and training.batch_size is less; raise it")
    changes = {"num_workers": workers, **({"gpus_per_worker": 1} if gpu else {})}
    job = job.model_copy(update={"training": job.training.model_copy(update=changes)})

    device = GPUS[gpu] if gpu else None
    return job, device.on_network(network) if device and network else device


def _network(job: Job, rehearsal: Rehearsal, gpu: Gpu, sizes: Sequence[PairSize]) -> Iterator[str]:
    """What workers send, and over which network; nothing where they meet only at the end of a step."""
    workers = smallest(job.training.num_workers)
    elements = backend_of(job).elements_sent(job, rehearsal.weights, rehearsal.trained)
    if workers == 1 or not elements:
        return
    yield _messages(job, rehearsal, gpu, sizes, elements)
    if workers > PER_NODE:
        yield (
            f"between nodes of {PER_NODE} at {gpu.node_gbits:,.0f} Gb/s; without EFA, GPUDirect or InfiniBand "
            "NCCL uses TCP, which is far slower: measure it and give --network"
        )


def _headline(job: Job, rehearsal: Rehearsal, gpu: str | None) -> str:
    training, method = job.training, backend_of(job).name_of(job)
    device = gpu or ("GPU" if training.gpus_per_worker else f"{worker_cores(training)}-core CPU")
    return (
        f"{job.student.described}: {rehearsal.weights / 1e6:,.1f} M weights, {rehearsal.trained / 1e6:,.1f} M trained, "
        f"{student_dtype(job)}\n{training.num_workers} x {device}, {method}, "
        f"{'packed' if rehearsal.packed else 'padded'} rows of {training.tokens_per_batch} tokens"
    )


def _memory(parts: dict[str, int], limit: float | None) -> Iterator[str]:
    total = sum(parts.values()) / GIB
    cells = [[f"  {name}", f"{amount / GIB:.2f}", ""] for name, amount in parts.items() if amount]
    cells.append(["  total", f"{total:.2f}", f"of {limit:.0f}" if limit else ""])
    yield from aligned([["GiB per worker", "", ""], *cells], right=[1])

    if limit and total > limit:
        yield (
            "does not fit: more workers share weights and optimizer under ZeRO-3; training.lora needs hardly any "
            "optimizer; gradient_checkpointing and a smaller tokens_per_batch need less for activations, and for rows "
            "that are long by themselves mlp_tile and offload_activations"
        )


def _offloaded(job: Job, parts: dict[str, int]) -> str:
    each, workers = sum(parts.values()), min(smallest(job.training.num_workers), PER_NODE)
    named = ", ".join(f"{name} {amount / GIB:,.1f}" for name, amount in parts.items())
    return (
        f"CPU memory for what is offloaded: {each / GIB:,.1f} GiB for each worker ({named}), "
        f"{workers * each / GIB:,.0f} for {workers} on a node"
    )


def _speed(job: Job, rehearsal: Rehearsal, gpu: str | None, sizes: Sequence[PairSize]) -> Iterator[str]:
    rate = GPUS[gpu].flops if gpu else _cpu_rate(job)
    workers = smallest(job.training.num_workers)
    seconds = rehearsal.arithmetic.flops(sizes, rehearsal.packed) / (rate * workers * ASSUMED_MFU)
    guess = f"{ASSUMED_MFU:.0%} of {rate / 1e12:,.2f} TFLOP/s per worker, guessed"
    tokens = sum(size.tokens for size in sizes)
    yield f"about {tokens / seconds:,.0f} tokens/s ({guess})"
    rows = f"1,000 {_named(sizes)} of {tokens / len(sizes):,.0f} tokens"
    yield f"{rows} in about {1000 * seconds / len(sizes) / 60:,.1f} min"


def _named(sizes: Sequence[PairSize]) -> str:
    """What rows of these sizes are called."""
    answers = sorted({len(size.answers) for size in sizes})
    if answers == [2]:
        return "pairs"
    range_of = " to ".join(map(str, dict.fromkeys((answers[0], answers[-1]))))
    return f"groups of {range_of} answers"


def _messages(job: Job, rehearsal: Rehearsal, gpu: Gpu, sizes: Sequence[PairSize], elements: int) -> str:
    """What a step sends, so many elements in a micro-batch, beside its products."""
    training, workers = job.training, smallest(job.training.num_workers)
    # One worker's part of a step, in pairs of the mean size.
    share = training.batch_size / workers / len(sizes)
    tokens = share * sum(size.packed if rehearsal.packed else size.tokens for size in sizes)
    micros = max(1, math.ceil(tokens / training.tokens_per_batch))
    flops = share * rehearsal.arithmetic.flops(sizes, rehearsal.packed)

    cost = sent(flops / micros, elements, workers, gpu, ASSUMED_MFU * gpu.flops)
    amount = micros * bytes_sent(elements, workers) / GIB
    best, worst = (cost.products / seconds for seconds in cost.range)
    in_all = f"{backend_of(job).name_of(job)} sends each worker {amount:,.1f} GiB a step"
    return (
        f"{in_all}, in {micros * cost.messages:.2f} s beside {micros * cost.products:.2f} s of products: "
        f"{worst:.0%} to {best:.0%} of that rate are left"
    )


def _cpu_rate(job: Job) -> float:
    """FLOP/s of one CPU worker: this machine's matrix products, by the worker's share of the cores."""
    rate = matmul_rate(1024, 4096, getattr(torch, student_dtype(job)), torch.device("cpu"))
    return rate * min(1.0, worker_cores(job.training) / len(available_cores()))
