"""A real Ray cluster of several nodes on this machine, one of which can be taken away."""

import subprocess
import sys
from contextlib import suppress

import psutil


class Nodes:
    """A head that runs nothing, and a node of each kind, or two of none, that do."""

    def __init__(self, *kinds):
        from ray.cluster_utils import Cluster

        # The Ray of other tests lives in the same process.
        self.others = set(psutil.Process().children(recursive=True))
        store = 120 << 20
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": store, "dashboard_host": "127.0.0.1"},
        )
        declared = [{kind: 1} for kind in kinds] or [{}, {}]
        self.workers = [self.cluster.add_node(num_cpus=6, object_store_memory=store, resources=one) for one in declared]

    @property
    def address(self):
        return self.cluster.address

    def pids(self):
        return [process.process.pid for node in self.cluster.list_all_nodes() for process in raylets(node)]

    def of(self, process):
        """The node that a process runs on."""
        above = {parent.pid for parent in process.parents()}
        for node in self.workers:
            if above & {raylet.process.pid for raylet in raylets(node)}:
                return node
        raise AssertionError(f"{process} is on no node that can be taken away")

    def remove(self, process):
        """Take away the node that a process runs on, as if its machine were gone."""
        node = self.of(process)
        lost = [one for raylet in raylets(node) for one in psutil.Process(raylet.process.pid).children(recursive=True)]
        self.cluster.remove_node(node, allow_graceful=False)
        self.workers.remove(node)
        # An engine's own processes would outlive the actor that started them.
        for one in lost:
            with suppress(psutil.NoSuchProcess):
                one.kill()

    def announce(self, process):
        """Tell Ray, as a cloud's agent does, that the node of a process will be taken away."""
        to_node = ["--address", self.address, "--node-id", self.of(process).node_id]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        subprocess.run([*ray, *to_node, *reason, "--deadline-remaining-seconds", "120"], check=True)

    def end(self):
        own = [child for child in psutil.Process().children(recursive=True) if child not in self.others]
        self.cluster.shutdown()
        _, alive = psutil.wait_procs(own, timeout=20)
        for process in alive:
            process.kill()


def raylets(node):
    return node.all_processes.get("raylet", [])
