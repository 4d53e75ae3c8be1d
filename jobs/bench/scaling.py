"""How near to linear many nodes are: real Ray nodes on one machine, each with an engine that takes a known time.

    python jobs/bench/scaling.py [--nodes 1 2 4 8 16] [--seconds 60]

Every node has one engine that holds 16 conversations of three turns at once and sleeps half a second for each turn, so
that a node writes 10.7 rows a second whatever the machine; all else is real: Ray's nodes, blocks through the object
store, parts on disk. Each size runs alone in its process on a cluster of its own. Printed are rows a second between
30% and 90% of the rows, when all engines are at work; the share of what so many engines would write; and the cores
that the machine and the driver had at work. The machine carries all nodes at once: where its cores are full, it and not
rdpo is the limit.
"""

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from jobs.bench.dataplane import FIRST, STUDENT, Echo, write_prompts
from rdpo.config import Job
from rdpo.tracking.console import Console, Listener

if TYPE_CHECKING:
    from rdpo.synthesis.teacher import Speaker

TURNS, TURN_S, AT_ONCE = 3, 0.5, 16
NODE_ROWS_PER_S = AT_ONCE / (TURNS * TURN_S)
WINDOW = (0.3, 0.9)
STORE_BYTES = 100 << 20
NODE = "teacher"


class Slow(Echo):
    """A speaker that takes its time, and no core."""

    async def say(self, messages, turn, sampling, seed):
        """The last message, after a while."""
        await asyncio.sleep(TURN_S)
        return await super().say(messages, turn, sampling, seed)


class Pace(Listener):
    """When how many rows were written, and how long the machine's cores, and the driver, had worked by then."""

    def __init__(self):
        self.seen: list[tuple[float, int, float, float]] = []

    def progress(self, meter):
        """One block more is stored."""
        if meter.stage == "synthesis" and meter.done:
            self.seen.append((time.monotonic(), meter.done, _machine_s(), _driver_s()))

    def within(self, rows: int) -> dict[str, float]:
        """In the window: rows a second, and the cores that the machine and the driver had at work."""
        low, high = (share * rows for share in WINDOW)
        inside = [one for one in self.seen if low <= one[1] <= high]
        seconds, written, machine, driver = (last - first for first, last in zip(inside[0], inside[-1], strict=True))
        return {"rows": written / seconds, "machine": machine / seconds, "driver": driver / seconds}


def _machine_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.system + times.nice + times.softirq


def _driver_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def job_of(source: Path, nodes: int, address: str) -> Job:
    """A job whose engines go one to each node."""
    engine = {"batch_rows": AT_ONCE, "batches_in_flight": 1, "cpus": 1, "concurrency": nodes}
    return Job.model_validate(
        {
            "name": "scaling",
            "student": {"model": STUDENT},
            "prompts": {"source": str(source), "heldout_fraction": 0.01},
            "synthesis": {"task": "roleplay", "engine": engine},
            "rewards": [{"kind": "function", "name": "words", "function": "jobs.bench.dataplane:words"}],
            "cluster": {"address": address, "placement": {"teacher": NODE}},
        }
    )


def stages(job):
    """Prompts, and synthesis with the teacher's engine replaced by `Slow`."""
    from rdpo.stages.table import stages_of
    from rdpo.synthesis.crashes import open_crash_counts
    from rdpo.synthesis.teacher import Teacher, speaker_pool

    def speak(rows, run):
        speaker: Callable[[Job], Speaker] = Slow
        arguments = {"job": run.job, "speaker_class": speaker, "crash_counts": open_crash_counts()}
        return speaker_pool(run.job).map(rows, Teacher, **arguments)

    named = {stage.name: stage for stage in stages_of(job)}
    synthesis = named["synthesis"]
    assert synthesis.rows
    return [named["prompts"], replace(synthesis, rows=replace(synthesis.rows, steps=lambda run: [speak]))]


def measure(nodes: int, rows: int, folder: Path) -> dict:
    """Run one size on a cluster of a head and so many nodes; its figures."""
    import ray
    from ray.cluster_utils import Cluster

    from rdpo.cluster.connection import start_ray
    from rdpo.execution.pipeline import locked, run_stages
    from rdpo.execution.run import Run

    head = {"num_cpus": 4, "object_store_memory": 4 * STORE_BYTES, "dashboard_host": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(nodes):
        cluster.add_node(wait=False, num_cpus=1, resources={NODE: 1}, object_store_memory=STORE_BYTES)
    cluster.wait_for_nodes()
    write_prompts(folder / "prompts.jsonl", rows)
    job, run_dir, pace = job_of(folder / "prompts.jsonl", nodes, cluster.address), str(folder / "run"), Pace()
    start_ray(job)
    with locked(job, run_dir):
        run = Run(job, run_dir, Console(sys.stderr), lambda *_: False)
        run.console.listeners = [pace]
        run_stages(run, stages(job))
    # A driver whose cluster goes before it does exits with an error.
    ray.shutdown()
    cluster.shutdown()
    found = pace.within(rows)
    return {
        "rows": rows,
        "nodes": nodes,
        "rows_per_s": round(found["rows"], 1),
        "efficiency": round(found["rows"] / (nodes * NODE_ROWS_PER_S), 3),
        "machine_cpu": round(found["machine"] / psutil.cpu_count(), 2),
        "driver_cpu": round(found["driver"], 2),
        "driver_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def alone(nodes: int, seconds: float) -> dict:
    """The figures of one size, measured in a process of its own."""
    rows = int(nodes * NODE_ROWS_PER_S * seconds)
    command = [sys.executable, "-m", "jobs.bench.scaling", "--one", str(nodes), str(rows)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith(FIRST)))


def table(sizes: list[dict]) -> str:
    """The figures as text."""
    lines = [f"{'nodes':>6}{'rows/s':>9}{'efficiency':>12}{'machine CPU':>13}{'driver CPU':>12}{'driver':>12}"]
    for size in sizes:
        lines.append(
            f"{size['nodes']:>6}{size['rows_per_s']:>9.1f}{size['efficiency']:>12.2f}{size['machine_cpu']:>13.0%}"
            f"{size['driver_cpu']:>12.0%}{size['driver_mib']:>8} MiB"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every size, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=60, help="how long the rows would take at full pace")
    parser.add_argument("--one", type=int, nargs=2)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(options.one[0], options.one[1], Path(folder))))
        return
    sizes = [alone(nodes, options.seconds) for nodes in options.nodes]
    print(table(sizes))
    print(json.dumps({"sizes": sizes}))


if __name__ == "__main__":
    main()
