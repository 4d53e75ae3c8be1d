"""Ten thousand rows through synthesis and rewards while an actor is killed every few seconds."""

import io
import json
import random
import threading

import psutil
import pytest

from jobs.bench.dataplane import echoing
from rdpo.config import Job
from rdpo.execution.pipeline import locked, run_stages
from rdpo.execution.run import Run
from rdpo.tracking.console import Console

pytestmark = [pytest.mark.ray, pytest.mark.long]

ROWS = 10_000
EVERY_S = 3.0
LEAST_KILLS = 5


class Killer(threading.Thread):
    """Kills one of Ray's pool actors every few seconds, as long as the context lasts."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ended, self.kills, self.draw = threading.Event(), 0, random.Random(0)

    def run(self):
        while not self.ended.wait(EVERY_S):
            actors = [one for one in psutil.Process().children(recursive=True) if is_actor(one)]
            if actors:
                self.draw.choice(sorted(actors, key=lambda one: one.pid)).kill()
                self.kills += 1

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.ended.set()
        self.join()


def is_actor(process):
    try:
        return process.cmdline()[0].startswith("ray::MapWorker")
    except (psutil.Error, IndexError):
        return False


def test_ten_thousand_rows_outlive_their_actors(ray_cluster, job_table, tmp_path):
    with open(tmp_path / "many.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": f"question {index}", "split": "train"}) + "\n" for index in range(ROWS))
        file.write(json.dumps({"prompt": "held out", "split": "heldout"}) + "\n")
    job_table["prompts"]["source"] = str(tmp_path / "many.jsonl")
    job_table["synthesis"]["engine"] |= {"batch_rows": 20, "concurrency": 2, "cpus": 1}
    job_table["rewards"][0] |= {"function": "tests.rewards:length"}
    job = Job.model_validate(job_table)
    with locked(job, str(tmp_path / "run")), Killer() as killer:
        run = Run(job, str(tmp_path / "run"), Console(io.StringIO()), lambda *_: False)
        run_stages(run, [stage for stage in echoing(job) if stage.name != "pairs"])
    assert killer.kills >= LEAST_KILLS
    for stage in ("synthesis", "rewards"):
        folder = run.folder(stage)
        ids = folder.ids("prompt_id").to_pylist()
        assert len(ids) == len(set(ids)) == ROWS, folder.reasons()
        assert not run.manifests[stage].dropped
