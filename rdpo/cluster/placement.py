"""Whether pools of actors fit on the nodes of a cluster, and which of them at the same time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from rdpo.cluster.gpus import Gpu, gpu_of
from rdpo.cluster.pools import Pool
from rdpo.config import RESOURCES, Cluster, largest, smallest
from rdpo.errors import InputError
from rdpo.tracking.tables import aligned

ACCELERATOR = "accelerator_type:"
"""Beginning of the resource by which Ray says what GPUs a node has."""
NODE_GROUP = "ray.io/node-group"
"""Label of a node that a cluster launcher or KubeRay has started, so that more may follow."""


@dataclass(frozen=True)
class Nodes:
    """What each node of a cluster has, by resource; and whether an autoscaler may start more."""

    resources: Sequence[dict[str, float]]
    grows: bool = False

    @classmethod
    def of(cls, ray: ModuleType) -> Nodes:
        """The nodes of the cluster that this process is connected to."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        return cls([node["Resources"] for node in alive], any(NODE_GROUP in node["Labels"] for node in alive))

    def room(self, pool: Pool) -> int:
        """How many processes of a pool they hold, were they empty."""
        return sum(_times(node, pool.process) for node in self.resources)

    def gpus(self, name: str | None = None) -> float:
        """GPUs of all of them, or of those of a kind."""
        return sum(node.get("GPU", 0) for node in self.resources if name is None or name in node)

    def cards(self, name: str | None = None) -> dict[str, Gpu]:
        """The GPUs of all nodes, or of those of a kind, by Ray's name for them; those whose type is known."""
        there = [node for node in self.resources if name is None or name in node]
        labels = {label for node in there for label in node if label.startswith(ACCELERATOR)}
        types = {label.removeprefix(ACCELERATOR) for label in labels}
        known = {label: gpu_of(label.replace("-", " ")) for label in sorted(types)}
        return {label: gpu for label, gpu in known.items() if gpu}


def _times(node: dict[str, float], actor: dict[str, float]) -> int:
    # 1 / 0.1 must count as 10, not as 9.
    return min(math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in actor.items() if amount)


def check_room(pools: Sequence[Pool], nodes: Nodes) -> list[Pool]:
    """Compare what the smallest size of each pool takes with what the nodes have.

    Returns:
        The pools that an autoscaler has to start nodes for.

    Raises:
        InputError: a pool does not fit, and there is no autoscaler.
    """
    # Of empty nodes: what runs there now may have ended before this pool starts.
    lacking = [pool for pool in pools if nodes.room(pool) < smallest(pool.processes)]
    if lacking and not nodes.grows:
        raise InputError(_misfit(lacking[0], nodes))
    return lacking


def _misfit(pool: Pool, nodes: Nodes) -> str:
    shapes = Counter(_in_words(node) for node in nodes.resources)
    there = "; ".join(f"{count} x {shape}" for shape, count in shapes.items())
    wanted = f"{pool.setting}: {smallest(pool.processes)} x {pool}"
    if pool.nodes and not any(pool.nodes in node for node in nodes.resources):
        start = f"""`ray start --resources='{{"{pool.nodes}": 1}}'`"""
        return f"{wanted}: no node declares {pool.nodes}; start one with {start}, or change cluster.placement ({there})"
    return (
        f"{wanted} does not fit; there is room for {nodes.room(pool)}. The nodes are {there}; lower its GPUs (0 is the "
        "CPU), its CPUs or its number of actors"
    )


def _in_words(resources: dict[str, float]) -> str:
    """CPUs, GPUs and the kinds of a node, in words."""
    amounts = [f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU")]
    # Ray gives every node a resource with its address.
    return ", ".join([*amounts, *(name for name in resources if not (name in RESOURCES or name.startswith("node:")))])


def fit_side_by_side(pools: Sequence[Pool], cluster: Cluster, nodes: Nodes) -> bool:
    """Whether teacher and rewards run at the same time: every pool has its GPUs, and one at most is on the CPU."""
    if cluster.streaming != "auto":
        return cluster.streaming == "on"
    pools = [pool for pool in pools if pool.stage in ("synthesis", "rewards")]
    if sum(not pool.gpus for pool in pools) > 1:
        return False

    shared = Counter(pool.nodes for pool in pools)
    # Nodes are started for a pool that has a kind to itself; several might wait for each other.
    here = [pool for pool in pools if not (nodes.grows and pool.nodes and shared[pool.nodes] == 1)]
    # What all of them take must be there in all, and what those of a kind take on its nodes.
    kinds = {None, *(pool.nodes for pool in here)}
    return all(_gpus(here, kind) <= nodes.gpus(kind) for kind in kinds)


def _gpus(pools: Sequence[Pool], kind: str | None) -> float:
    """GPUs that the pools take on nodes of a kind, or anywhere."""
    return sum(pool.gpus * smallest(pool.processes) for pool in pools if kind in (None, pool.nodes))


def placement_table(pools: Sequence[Pool]) -> list[str]:
    """Which pool takes what and runs where, as lines of text."""
    cells = [["stage", "pool", "processes", "CPUs each", "GPUs each", "nodes"]]
    for pool in pools:
        low, high = smallest(pool.processes), largest(pool.processes)
        count = str(high) if low == high else f"{low}-{high}"
        cells.append([pool.stage, pool.setting, count, str(pool.cpus), f"{pool.gpus:g}", pool.nodes or "anywhere"])
    return aligned(cells, right=[2, 3, 4])
