"""A real engine whose process is killed in the middle: its rows are done again, each comes out once."""

import os
import signal
import threading
import time

import psutil
import pytest

from rdpo.config import Job
from rdpo.synthesis.teacher import synthesize

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

ROWS = 24
PATIENCE_S = 240


class Noting:
    """The engine's speaker, which notes the engine's process once it has spoken."""

    def __init__(self, path):
        self.path = path

    def __call__(self, job):
        from rdpo.synthesis.teacher import EngineSpeaker

        path = self.path

        class Voice(EngineSpeaker):
            async def say(self, *arguments):
                said = await super().say(*arguments)
                if not path.exists():
                    cores = [child for child in psutil.Process().children() if child.name().startswith("VLLM::")]
                    path.write_text(str(cores[0].pid))
                return said

        return Voice(job)


def kill_noted(path, killed):
    """Kill the noted engine as soon as there is one."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and not killed:
        if path.exists() and path.read_text():
            killed.append(int(path.read_text()))
            os.kill(killed[0], signal.SIGKILL)
        time.sleep(0.05)


def test_rows_of_a_killed_engine_are_done_again(ray_cluster, job_table, wordy_models, tmp_path, monkeypatch):
    import ray

    from rdpo.synthesis import teacher

    engine = {"max_model_len": 512, "kv_cache_gib": 1, "batch_rows": 4, "batches_in_flight": 2, "dtype": "float32"}
    job_table["student"]["model"] = wordy_models[0]
    job_table["synthesis"] |= {"engine": engine, "sampling": {"max_tokens": 32, "temperature": 1.0}}
    noted, killed = tmp_path / "engine", []
    monkeypatch.setattr(teacher, "EngineSpeaker", Noting(noted))
    rows = [
        {"prompt_id": f"p{index:02d}", "prompt": [{"role": "user", "content": f"q{index}"}], "extra": "{}"}
        for index in range(ROWS)
    ]
    killer = threading.Thread(target=kill_noted, args=(noted, killed), daemon=True)
    killer.start()
    written = synthesize(ray.data.from_items(rows), Job.model_validate(job_table)).take_all()
    assert killed
    assert sorted(row["prompt_id"] for row in written) == [row["prompt_id"] for row in rows]
    assert all(row["revision"] for row in written if not row["dropped"])
    assert not any("died" in (row["dropped"] or "") for row in written)
