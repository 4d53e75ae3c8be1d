"""Which precision and which cores the hardware is quick with, and how much memory a process took."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from rdpo.cluster.gpus import gpu_of
from rdpo.config.section import largest

if TYPE_CHECKING:
    import torch

    from rdpo.config import Training

ALLOCATOR = "PYTORCH_ALLOC_CONF"
"""What torch's allocator on GPUs reads."""
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


COMPUTED = "compute_dtype"
"""Name under which a stage's settings hold the precision that `dtype = "auto"` comes to on these machines."""


def computed_dtype(dtype: str, gpus: float) -> dict[str, str]:
    """The precision of a model on so many GPUs, or on the CPU, as settings hold it beside the job's own word."""
    return {COMPUTED: compute_dtype(dtype, gpus > 0)}


def compute_dtype(dtype: str, gpu: bool) -> str:
    """`auto` made definite: bfloat16 on GPUs and on CPUs that multiply in it, else float32.

    A CPU without such instructions multiplies bfloat16 several times slower than float32.
    """
    if dtype != "auto":
        return dtype
    return "bfloat16" if gpu or _cpu_has_bf16() else "float32"


@lru_cache(maxsize=1)
def _cpu_has_bf16() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return any(flag in flags.split() for flag in BF16_FLAGS)


def available_cores() -> list[int]:
    """The cores this process may run on."""
    # A container or a batch system may give fewer than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def take_device(gpus: float, cpus: int | None = None) -> str:
    """The device of an actor: its GPU, or the CPU with torch's threads set to `cpus`, by default all cores."""
    if gpus:
        # The only GPU that it sees is the one that Ray has given it.
        return "cuda"
    import torch

    # By itself torch takes all cores, in each of several actors.
    torch.set_num_threads(cpus or len(available_cores()))
    return "cpu"


def allocator_environment() -> dict[str, str]:
    """The environment of a process whose micro-batches have ever other lengths.

    Blocks that grow in place leave no holes between them. What the environment says already holds.
    """
    return {ALLOCATOR: os.environ.get(ALLOCATOR, "expandable_segments:True")}


def worker_cores(training: Training) -> int:
    """Cores of one training worker: as the job says, else its share of this machine's, or one beside a GPU."""
    if training.cpus_per_worker or training.gpus_per_worker:
        return training.cpus_per_worker or 1
    return max(1, len(available_cores()) // largest(training.num_workers))


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its datasheet; None of a CPU, and of a type that is not known."""
    import torch

    gpu = gpu_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.flops if gpu else None


def shared_memory(device: torch.device) -> int | None:
    """Bytes of shared memory that one block may have on a GPU; None on a CPU, or where torch does not say."""
    if device.type != "cuda":
        return None
    import torch

    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held, in GiB: allocated on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / (1 << 30)
    import resource

    # Linux counts it in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
