"""What GPU types give, from their datasheets."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU type: dense bfloat16 FLOP/s and memory in GiB."""

    flops: float
    memory_gib: float


GPUS = {
    "A10": Gpu(125e12, 22),
    "A100-40": Gpu(312e12, 39),
    "A100": Gpu(312e12, 79),
    "B200": Gpu(2250e12, 178),
    "H100": Gpu(989e12, 79),
    "H200": Gpu(989e12, 140),
    "L4": Gpu(121e12, 22),
    "L40S": Gpu(362e12, 44),
    "RTX4090": Gpu(165e12, 23),
}


def gpu_of(device_name: str) -> Gpu | None:
    """The type of a device by the name that its driver gives it, as `NVIDIA H100 80GB HBM3`; None if it is unknown."""
    words = set(re.split(r"\W+", device_name.replace("RTX 4090", "RTX4090")))
    return next((gpu for name, gpu in GPUS.items() if name in words), None)
