"""Two rounds of DICE through the command line: own samples, own implicit reward, replay; killed in round two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rdpo.files.stage_folder import StageFolder
from rdpo.records import prompt_id
from tests.support.jobs import ALL_STAGES, valid_job, write_job, write_jsonl

# Whole runs of two rounds, of which one is ended half way.
pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
PATIENCE = 600


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("rounds")


@pytest.fixture(scope="module")
def command(wordy_models, place):
    """`rdpo run` of a job whose ready pairs are: 8 usable, 2 of a generated prompt, 1 held out, 1 twice, 1 broken."""
    job = valid_job(wordy_models[0], place)
    prompts = [f"other question {index}" for index in range(8)] + ["question 1", "question 2", "question 0"]
    ready = [{"prompt": prompt, "chosen": "a plain answer", "rejected": "arr"} for prompt in prompts]
    write_jsonl(place / "ready.jsonl", [*ready, ready[3], {"prompt": "q", "chosen": "", "rejected": "b"}])
    job["synthesis"]["task"] = "best_of"
    job["rewards"] = [
        {"kind": "implicit", "name": "own", "beta": 1.0, "reference": wordy_models[1], "tokens_per_batch": 1024}
    ]
    job["pairs"] = {"chosen": "best", "rejected": "worst", "length_coef": "auto"}
    job["replay"] = {"source": str(place / "ready.jsonl"), "share": 0.5}
    job["training"] |= {"lora": {"rank": 4}, "reward_as": "none"}
    job["rounds"] = {"count": 2, "min_gain": -1e9}
    path = write_job(place / "job.toml", job)
    return [sys.executable, "-m", "rdpo", "run", path, "--run-dir", str(place / "run")]


def kill_in_round_two(command, place):
    """Kill -9 the driver as soon as round two has its scores."""
    with open(place / "killed.log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + PATIENCE
        while StageFolder(str(place / "run" / "rounds" / "2"), "rewards").manifest() is None:
            assert process.poll() is None, (place / "killed.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def folder(place, number, stage):
    return StageFolder(str(place / "run" / "rounds" / str(number)), stage)


def test_killed_in_round_two_the_same_command_resumes(command, place):
    kill_in_round_two(command, place)
    made = {number: folder(place, number, "rewards").manifest().created for number in (1, 2)}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    first, second = ended.stdout.split("\nround 2, from ")
    assert first.count("up to date") == len(ALL_STAGES) + 1  # and replay
    assert second.count("up to date") == 4
    assert {number: folder(place, number, "rewards").manifest().created for number in (1, 2)} == made
    last = (place / "run" / "model" / "model.safetensors").read_bytes()
    assert last == (place / "run" / "rounds" / "2" / "model" / "model.safetensors").read_bytes()
    assert last != (place / "run" / "rounds" / "1" / "model" / "model.safetensors").read_bytes()
    assert "own (optimised), 3 prompts" in ended.stdout


def test_ready_pairs_are_counted_and_never_share_a_prompt_with_generated_ones(command, place):
    for number in (1, 2):
        generated = folder(place, number, "pairs").manifest().rows_out
        replay, reference = (folder(place, number, stage).manifest() for stage in ("replay", "reference"))
        # Of 11 ready pairs half may be generated ones, so int(11 / 2) = 5 and as many ready ones.
        assert replay.summary["generated"] == min(5, generated)
        assert replay.rows_in == replay.rows_out + sum(replay.dropped.values()) == 13
        assert replay.dropped["chosen: empty"] == replay.dropped["duplicate of an earlier prompt"] == 1
        assert replay.dropped["its prompt is held out for evaluation"] == 1
        assert reference.rows_in == replay.summary["generated"] + replay.rows_out
        trained = [prompt_id(row["prompt"]) for row in folder(place, number, "reference").table().to_pylist()]
        assert len(set(trained)) == len(trained) == reference.rows_in
        heldout = {prompt_id([{"role": "user", "content": f"question {index}"}]) for index in range(0, 12, 4)}
        assert not heldout & set(trained)


def test_the_second_round_starts_from_the_first_ones_model(command, place):
    settings = json.loads((place / "run" / "rounds" / "2" / "reference" / "manifest.json").read_text())["settings"]
    assert settings["student"]["model"] == str(place / "run" / "rounds" / "1" / "model")
    rewards = json.loads((place / "run" / "rounds" / "2" / "rewards" / "manifest.json").read_text())["settings"]
    first = json.loads((place / "run" / "rounds" / "1" / "reference" / "manifest.json").read_text())["settings"]
    assert rewards["rewards"][0]["reference"] != rewards["rewards"][0]["weights"]
    assert rewards["rewards"][0]["reference"] == first["student"]["weights"]
