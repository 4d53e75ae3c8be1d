"""A real Ray cluster of several nodes on this machine, one of which can be taken away."""

import psutil


class Nodes:
    """A head that runs nothing, and a node of each kind, or two of none, that do."""

    def __init__(self, *kinds):
        from ray.cluster_utils import Cluster

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

    def remove(self, process):
        """Take away the node that a process runs on, as if its machine were gone."""
        above = {parent.pid for parent in process.parents()}
        for node in self.workers:
            if above & {raylet.process.pid for raylet in raylets(node)}:
                self.cluster.remove_node(node, allow_graceful=False)
                self.workers.remove(node)
                return
        raise AssertionError(f"{process} is on no node that can be taken away")

    def end(self):
        children = psutil.Process().children(recursive=True)
        self.cluster.shutdown()
        _, alive = psutil.wait_procs(children, timeout=20)
        for process in alive:
            process.kill()


def raylets(node):
    return node.all_processes.get("raylet", [])
