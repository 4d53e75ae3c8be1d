"""What GPU types give, from their datasheets, and how they are usually connected."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

PER_NODE = 8
PCIE = 32e9
"""Bytes a second of 16 lanes of PCI Express 4, where GPUs have no link of their own."""
ETHERNET = 3.1e9
"""Bytes a second of 25 Gb/s, a GPU's share where nodes have no network for training."""


@dataclass(frozen=True)
class Gpu:
    """A GPU type: dense bfloat16 FLOP/s, memory in GiB, and bytes a second that reach a GPU from the others.

    `link` is within a node; `network` is the GPU's share of what a node with eight of them has in the clouds. `shared`
    is the shared memory that one block of threads may have, in bytes (CUDA's programming guide, by compute capability).
    """

    flops: float
    memory_gib: float
    link: float = PCIE
    network: float = ETHERNET
    shared: int = 99 << 10

    def arriving(self, workers: int) -> float:
        """Bytes a second that so many workers, on full nodes, can each take in: what leaves a node is shared by it."""
        return self.link if workers <= PER_NODE else min(self.link, PER_NODE * self.network)

    @property
    def node_gbits(self) -> float:
        """Gigabits a second that a node with eight of them takes in from others."""
        return PER_NODE * self.network * 8 / 1e9

    def on_network(self, node_gbits: float) -> Gpu:
        """The same GPU where nodes are connected at another rate, in gigabits a second."""
        return replace(self, network=node_gbits * 1e9 / 8 / PER_NODE)


GPUS = {
    "A10": Gpu(125e12, 22),
    "A100-40": Gpu(312e12, 39, 300e9, 25e9, 163 << 10),
    "A100": Gpu(312e12, 79, 300e9, 25e9, 163 << 10),
    "B200": Gpu(2250e12, 178, 900e9, 50e9, 227 << 10),
    "H100": Gpu(989e12, 79, 450e9, 50e9, 227 << 10),
    "H200": Gpu(989e12, 140, 450e9, 50e9, 227 << 10),
    "L4": Gpu(121e12, 22),
    "L40S": Gpu(362e12, 44),
    "RTX4090": Gpu(165e12, 23),
}


def gpu_of(device_name: str) -> Gpu | None:
    """The type of a device by the name that its driver gives it, as `NVIDIA H100 80GB HBM3`; None if it is unknown."""
    # By whole words: an L40S is no L4. The A10G is Amazon's A10.
    words = set(re.split(r"\W+", device_name.replace("RTX 4090", "RTX4090").replace("A10G", "A10")))
    return next((gpu for name, gpu in GPUS.items() if name in words), None)
