"""The whole pipeline through the command line: real vLLM, Ray, DeepSpeed; a tiny model; real kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rdpo.cli import main
from rdpo.execution.reader import RunReader
from rdpo.files.stage_folder import StageFolder
from rdpo.inspection.token_logps import TokenReader
from tests.support.jobs import ALL_STAGES, whole_job, write_job

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PATIENCE = 1500
"""Seconds until a command counts as hanging. It starts some thirty processes, on two cores beside other such tests."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("e2e")


@pytest.fixture(scope="module")
def job_path(place, wordy_models, tiny_classifier):
    lines = [json.dumps({"prompt": f"question {i}", "split": "heldout" if i % 4 == 0 else "train"}) for i in range(20)]
    lines += ["not json", json.dumps({"prompt": " "}), lines[1]]
    (place / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    table = whole_job(place / "prompts.jsonl", wordy_models[0], tiny_classifier)
    table["rewards"].append({"kind": "function", "name": "length", "function": "tests.rewards:length", "weight": 0.0})
    table["training"]["epochs"] = 4
    # Every process of a run must find it, whatever its working directory.
    table["student"]["model"] = os.path.relpath(wordy_models[0], ROOT)
    return write_job(place / "job.toml", table)


def command(job_path, run_dir, *more):
    return [sys.executable, "-m", "rdpo", "run", job_path, "--run-dir", str(run_dir), *more]


def run(job_path, run_dir, *more, **environment):
    return typed(run_dir, command(job_path, run_dir, *more), **environment)


def typed(run_dir, words, **environment):
    """What a command that works in a run prints, in a process of its own as each that starts Ray."""
    result = subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    log = Path(run_dir) / "logs" / "libraries.log"
    assert result.returncode == 0, result.stdout + result.stderr + (log.read_text()[-3000:] if log.exists() else "")
    return result.stdout


def manifests(run_dir):
    return {stage: StageFolder(str(run_dir), stage).manifest() for stage in ALL_STAGES}


@pytest.fixture(scope="module")
def finished(job_path, place):
    """A run that nothing disturbed; its directory and what it printed."""
    return place / "whole", run(job_path, place / "whole")


def test_run_ends_with_every_stage_and_says_the_result(finished):
    run_dir, printed = finished
    done = manifests(run_dir)
    assert all(done.values())
    assert (done["prompts"].rows_in, done["prompts"].rows_out) == (23, 20)
    assert sum(done["prompts"].dropped.values()) == 3
    for name in ("synthesis", "rewards", "pairs", "reference", "evaluation"):
        assert done[name].rows_in == done[name].rows_out + sum(done[name].dropped.values())
    assert done["training"].summary["steps"] == 4 * (-(-done["reference"].rows_out // 4))
    assert "win rate" in printed
    assert "report.html" in printed
    assert not any(noise in printed for noise in ("WARNING", "INFO", "pid="))


def test_published_model_loads_in_transformers_and_peft(finished):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_dir = finished[0] / "model"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    merged = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    expected = merged(**ids).logits
    adapter = AutoPeftModelForCausalLM.from_pretrained(str(model_dir / "adapter"))
    assert (adapter(**ids).logits - expected).abs().max() < 1e-3
    assert "held-out prompts" in (model_dir / "README.md").read_text()
    assert not [path for path in model_dir.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_show_gives_each_completion_token_its_log_prob_before_and_after(finished, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    run_dir = str(finished[0])
    row = StageFolder(run_dir, "reference").table().sort_by("prompt_id").to_pylist()[0]
    read = TokenReader(RunReader(run_dir)).read(row)
    trained = AutoModelForCausalLM.from_pretrained(finished[0] / "model")
    for side, values in read.items():
        assert sum(values.reference) == pytest.approx(row[f"reference_{side}_logps"], abs=1e-3)
        ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
        logps = trained(ids).logits.float().log_softmax(-1)[0, values.positions[0] - 1 : -1]
        expected = logps.gather(1, ids[0, values.positions[0] :, None])[:, 0].tolist()
        assert values.policy == pytest.approx(expected, abs=1e-3)
    assert main(["show", run_dir, "reference", "--logps", "--limit", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"{sum(read['rejected'].policy):.3f}" in printed
    assert main(["show", run_dir, "pairs", "--logps"]) == 2
    assert "only rows of the reference stage have the tokens" in capsys.readouterr().err


def test_report_is_one_self_contained_page(finished):
    page = (finished[0] / "report.html").read_text()
    for heading in ("What ran", "Scores", "Pairs", "Training", "Evaluation", "Answers, before and after", "Lineage"):
        assert f"<h2>{heading}</h2>" in page
    assert "line is not JSON" in page
    assert page.count("<svg") >= 3
    assert "src=" not in page
    assert page.count("<script") == 1


def test_a_finished_run_is_measured_on_suites_once(finished, tmp_path):
    """Two kinds of suites in one command, on a copy of the run: all rows accounted for, and not made twice."""
    run_dir = str(tmp_path / "proved")
    shutil.copytree(finished[0], run_dir)
    prove = [sys.executable, "-m", "rdpo", "prove", run_dir]
    printed = typed(run_dir, [*prove, "--suite", "claims", "--suite", "refusals"])
    assert "given up for the user's claim" in printed
    made = StageFolder(run_dir, "suites").manifest()
    assert made.rows_in == made.rows_out + sum(made.dropped.values()) == 260
    rows = StageFolder(run_dir, "suites").table().to_pylist()
    assert {row["suite"] for row in rows} == {"claims", "refusals"}
    assert all(row["start_value"] in (0.0, 0.5, 1.0) and row["trained_value"] is not None for row in rows)
    # Another model answers otherwise.
    assert any(row["start"] != row["trained"] for row in rows)
    assert '<section id="suites">' in (tmp_path / "proved" / "report.html").read_text()

    assert "up to date" in typed(run_dir, prove)
    assert StageFolder(run_dir, "suites").manifest() == made


def test_same_command_again_does_nothing(job_path, finished):
    before = manifests(finished[0])
    # Whoever started anything on Ray would fail: nothing listens there.
    printed = run(job_path, finished[0], RAY_ADDRESS="127.0.0.1:1")
    assert printed.count("up to date") == len(ALL_STAGES)
    assert manifests(finished[0]) == before


def test_a_changed_setting_runs_again_what_depends_on_it(job_path, finished, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)

    def planned(change):
        assert main(["run", job_path, "--run-dir", str(finished[0]), "--dry-run", "--set", change]) == 0
        return capsys.readouterr().out

    printed = planned("training.beta=0.2")
    plan = {line.split()[1]: " ".join(line.split()[2:]) for line in printed.splitlines() if line.startswith("# ")}
    assert plan == {stage: "would run again" if at > 5 else "up to date" for at, stage in enumerate(ALL_STAGES)}
    assert planned("synthesis.engine.batch_rows=2").count("up to date") == len(ALL_STAGES)


def kill_when(job_path, run_dir, condition, *more):
    """Start the run, and kill -9 its driver as soon as the condition holds."""
    process = subprocess.Popen(
        command(job_path, run_dir, *more),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


STREAMING = ("--set", "cluster.streaming=on")


@pytest.mark.long
@pytest.mark.timeout(1800)  # A whole run, another one that is ended twice, and both on two cores.
def test_killed_in_synthesis_and_in_training_the_same_command_resumes(job_path, finished, place):
    """With teacher and rewards at the same time, where the undisturbed run had them one after the other."""
    run_dir = place / "killed"
    synthesis, training = StageFolder(str(run_dir), "synthesis"), StageFolder(str(run_dir), "training")
    kill_when(job_path, run_dir, lambda: synthesis.parts(), *STREAMING)
    assert synthesis.manifest() is None
    kept = set(synthesis.parts())
    checkpoints = run_dir / "training" / "checkpoints"
    kill_when(job_path, run_dir, lambda: list(checkpoints.glob("checkpoint_*")), *STREAMING)
    assert training.manifest() is None
    assert kept <= set(synthesis.parts())
    run(job_path, run_dir, "--until", "training")
    for stage in ("synthesis", "rewards", "pairs", "reference"):
        exact, numbers = rows(run_dir, stage)
        expected, expected_numbers = rows(finished[0], stage)
        assert exact == expected
        assert numbers == pytest.approx(expected_numbers, abs=1e-4)
    assert StageFolder(str(run_dir), "rewards").manifest().together == ["synthesis"]
    assert losses(run_dir) == pytest.approx(losses(finished[0]), abs=1e-4)


def rows(run_dir, stage):
    """Rows of a stage: what must be the same to the letter, and the numbers, which depend on a batch's padding."""
    table = StageFolder(str(run_dir), stage).table().sort_by("prompt_id").to_pylist()
    exact, numbers = [], []
    for row in table:
        numbers += [value for value in row.values() if isinstance(value, float)]
        exact.append(
            {name: value for name, value in row.items() if not isinstance(value, float | dict) and "cached" not in name}
        )
    return exact, numbers


def losses(run_dir):
    lines = (run_dir / "training" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
