"""Real faults: what they do to a run that is under way, once the stage they are meant for is at work."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

PATIENCE_S = 900
POLL_S = 0.05
WORKERS = {"pairs": ("ray::Map", "ray::map"), "training": ("ray::RayTrainWorker",)}
ENGINES = ("VLLM::EngineCor", "VLLM::Worker")


@dataclass
class Victim:
    """A run under way: the driver, its directory, the stage to be hit, and Ray nodes that are not its own."""

    driver: subprocess.Popen
    run_dir: Path
    stage: str
    cluster: object = None

    @property
    def folder(self):
        return self.run_dir / self.stage

    def processes(self):
        """All processes that work for the run, by what they call themselves."""
        roots = [self.driver.pid, *(self.cluster.pids() if self.cluster else [])]
        found = []
        for root in roots:
            try:
                found += psutil.Process(root).children(recursive=True)
            except psutil.Error:
                continue
        return found

    def workers(self):
        """Ray's processes that do the stage's work."""
        kinds = WORKERS.get(self.stage, ("ray::MapWorker",))
        return [one for one in self.processes() if title(one).startswith(kinds)]

    def engines(self):
        return [one for one in self.processes() if title(one).startswith(ENGINES)]

    def at_work(self):
        """Whether the stage has begun, and has something to lose."""
        if not (self.folder / "in_progress.json").exists():
            return False
        if self.stage == "training":
            return bool(list(self.folder.glob("checkpoints/checkpoint_*")))
        if self.stage == "evaluation":
            return bool(self.engines())
        return bool(self.workers())

    def wait_until(self, condition):
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.driver.poll() is None, "the run ended before the fault"
            assert time.monotonic() < deadline, "the fault's moment did not come"
            time.sleep(POLL_S)


def title(process):
    try:
        return (process.cmdline() or [process.name()])[0]
    except psutil.Error:
        return ""


def kill_driver(victim):
    victim.wait_until(victim.at_work)
    os.kill(victim.driver.pid, signal.SIGKILL)


def kill_worker(victim):
    victim.wait_until(lambda: victim.at_work() and victim.workers())
    victim.workers()[0].kill()


def kill_engine(victim):
    """In synthesis once it has answered; an evaluation stores nothing before its end, so there as it starts."""
    ready = (lambda: list(victim.folder.glob("part-*"))) if victim.stage == "synthesis" else victim.at_work
    victim.wait_until(lambda: ready() and victim.engines())
    victim.engines()[-1].kill()


def terminate(victim):
    victim.wait_until(victim.at_work)
    os.kill(victim.driver.pid, signal.SIGTERM)


def remove_node(victim):
    """Take away a node on which a worker of the stage runs."""
    victim.wait_until(lambda: victim.at_work() and victim.workers())
    victim.cluster.remove(victim.workers()[0])


FAULTS = {
    "driver kill -9": kill_driver,
    "worker kill -9": kill_worker,
    "engine kill -9": kill_engine,
    "SIGTERM": terminate,
    "node removed": remove_node,
    "disk full": None,
}
