"""Which precision and which cores the hardware is quick with."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


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
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
