"""Ten thousand rows through synthesis and rewards while an actor is killed every few seconds."""

import io
import json
import random
import threading
from dataclasses import replace

import psutil
import pytest

from rdpo.config import Job
from rdpo.pipeline import Run, locked, run_stages
from rdpo.stages import stages_of
from rdpo.synthesis.engine import Generation, engine_pool
from rdpo.synthesis.teacher import Teacher
from rdpo.tracking import Console

pytestmark = [pytest.mark.ray, pytest.mark.long]

ROWS = 10_000
EVERY_S = 3.0
LEAST_KILLS = 5


class Echo:
    """A voice that answers at once with what it was asked."""

    def __init__(self, job):
        pass

    async def say(self, messages, turn, sampling, seed):
        text = messages[-1]["content"]
        return Generation(f"{turn.name}: {text}", "stop", len(text.split()), None, len(messages))

    def shutdown(self):
        pass


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


def speak(rows, run):
    return engine_pool(rows, Teacher, run.job.synthesis.engine, {"job": run.job, "voice": Echo})


def test_ten_thousand_rows_outlive_their_actors(ray_cluster, job_table, tmp_path):
    with open(tmp_path / "many.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": f"question {index}", "split": "train"}) + "\n" for index in range(ROWS))
        file.write(json.dumps({"prompt": "held out", "split": "heldout"}) + "\n")
    job_table["prompts"]["source"] = str(tmp_path / "many.jsonl")
    job_table["synthesis"]["engine"] |= {"batch_rows": 20, "concurrency": 2, "cpus": 1}
    job_table["rewards"][0] |= {"function": "tests.rewards:length"}
    job = Job.model_validate(job_table)
    stages = [stage for stage in stages_of(job) if stage.name in ("prompts", "synthesis", "rewards")]
    stages[1] = replace(stages[1], rows=replace(stages[1].rows, make=speak))
    with locked(job, str(tmp_path / "run")), Killer() as killer:
        run = Run(job, str(tmp_path / "run"), Console(io.StringIO()), lambda job: False)
        run_stages(run, stages)
    assert killer.kills >= LEAST_KILLS
    for stage in ("synthesis", "rewards"):
        folder = run.folder(stage)
        ids = folder.ids("prompt_id").to_pylist()
        assert len(ids) == len(set(ids)) == ROWS, folder.reasons()
        assert not run.manifests[stage].dropped
