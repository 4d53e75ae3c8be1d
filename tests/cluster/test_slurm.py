"""`cluster/slurm.sbatch` under a real Slurm of two nodes: submitted, asked to stop, requeued, finished."""

import json
import sys
import time
from pathlib import Path

import psutil
import pytest

from rdpo.files.stage_folder import StageFolder
from tests.support.jobs import ALL_STAGES, whole_job, write_job, write_jsonl
from tests.support.slurm import Slurm, missing

pytestmark = [
    *(pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)),
    pytest.mark.skipif(bool(missing()), reason=f"no Slurm: {', '.join(missing())} not installed (slurm-wlm, munge)"),
]

ROOT = Path(__file__).parents[2]
PATIENCE_S = 900
CPUS = 6


@pytest.fixture
def slurm(tmp_path):
    place = tmp_path / "slurm"
    place.mkdir()
    one = Slurm(place, CPUS)
    yield one
    jobs = one.command("squeue", "-h", "-o", "%i").split()
    one.command("scancel", *jobs) if jobs else None
    left = [process for number in ("1", "2") for _, process in one.processes(number)]
    _, alive = psutil.wait_procs(left, timeout=30)
    for process in alive:
        process.kill()
    one.end()


@pytest.fixture
def job_file(tmp_path, wordy_models, tiny_classifier):
    rows = [{"prompt": f"question {i}", "split": "train" if i % 4 else "heldout"} for i in range(12)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    table = whole_job(tmp_path / "prompts.jsonl", wordy_models[0], tiny_classifier)
    # Two workers do not fit on one node, and there are steps enough to be asked to stop between two of them.
    table["training"] |= {"cpus_per_worker": 4, "epochs": 40, "checkpoint_every": 4}
    table["cluster"] = {"placement": {"teacher": "teacher", "reward": "reward", "trainer": "trainer"}}
    return write_job(tmp_path / "job.toml", table)


class Submitted:
    """A job of the script, and what happened to it, with the time of each line since it was submitted."""

    def __init__(self, slurm, place, job_file, run_dir):
        self.slurm, self.log, self.transcript = slurm, place / "job.log", []
        self.began = time.monotonic()
        options = ["--parsable", "--nodes=2", "--gpus-per-node=0", f"--output={self.log}"]
        command = [*options, ROOT / "cluster" / "slurm.sbatch", job_file, "--run-dir", run_dir]
        environment = {"VENV": sys.prefix, "TOKEN_DIR": str(place)}
        self.number = slurm.command("sbatch", *command, cwd=ROOT, **environment).strip()
        self.note("sbatch " + " ".join(map(str, command)) + f" -> job {self.number}")

    def note(self, line):
        self.transcript.append(f"{time.monotonic() - self.began:6.0f} s  {line}")

    def said(self):
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join([*self.transcript, log[-6000:], self.slurm.said()])

    def wait_for(self, what, condition, within_s=PATIENCE_S):
        """Wait until it holds, while the job goes on."""
        deadline = time.monotonic() + within_s
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{what} does not come\n{self.said()}"
            time.sleep(0.5)
        self.note(what)
        return found

    def ended(self):
        fields = self.slurm.job(self.number)
        if fields["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
            return None
        return fields


def steps(run_dir):
    path = run_dir / "training" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_job_is_asked_to_stop_and_requeued_and_ends_with_a_model(slurm, job_file, tmp_path):
    run_dir = tmp_path / "run"
    job = Submitted(slurm, tmp_path, job_file, run_dir)
    job.wait_for("running", lambda: slurm.job(job.number)["JobState"] == "RUNNING")
    checkpoints = run_dir / "training" / "checkpoints"
    job.wait_for("a checkpoint of training", lambda: job.ended() or list(checkpoints.glob("checkpoint_*")))
    assert not job.ended(), job.said()

    trainers = [(node, one) for node, one in slurm.processes(job.number) if "ray::RayTrainWorker" in title(one)]
    assert sorted(node for node, _ in trainers) == ["one", "two"], job.said()
    job.note("training on nodes " + " and ".join(sorted(node for node, _ in trainers)))

    slurm.command("scancel", "--batch", "--signal=TERM", job.number)
    job.note(f"scancel --batch --signal=TERM {job.number}")
    fields = job.wait_for("ended", job.ended)
    first = steps(run_dir)
    job.note(f"{fields['JobState']}, exit code {fields['ExitCode']}, {len(first)} steps of training done")
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "1:0"), job.said()
    assert 0 < len(first) < 40 * 3 and list(checkpoints.glob("checkpoint_*"))
    assert not list(tmp_path.glob(".rdpo-token*"))
    assert "interrupted; the same command resumes" in job.log.read_text()

    slurm.command("scontrol", "requeue", job.number)
    # Slurm would wait two minutes.
    slurm.command("scontrol", "update", f"JobId={job.number}", "StartTime=now")
    job.note(f"scontrol requeue {job.number}")
    fields = job.wait_for("ended", job.ended)
    job.note(f"{fields['JobState']}, exit code {fields['ExitCode']}, restarts {fields['Restarts']}")
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), job.said()

    # A step that is done again has another time.
    assert steps(run_dir)[: len(first)] == first
    assert all(StageFolder(str(run_dir), stage).manifest() for stage in ALL_STAGES)
    assert (run_dir / "model" / "model.safetensors").is_file()
    job.note(f"{len(steps(run_dir))} steps of training, model/model.safetensors is there")
    # The requeued job's output comes behind that of the first.
    assert "interrupted" in job.log.read_text() and "win rate" in job.log.read_text()
    print("\n".join(job.transcript))


def title(process):
    try:
        return (process.cmdline() or [""])[0]
    except psutil.Error:
        return ""


def test_without_gpus_the_number_of_the_script_must_be_replaced(slurm, tmp_path):
    """What the script's first lines say; Slurm itself refuses it, before anything is begun."""
    with pytest.raises(AssertionError, match="Invalid generic resource"):
        slurm.command("sbatch", ROOT / "cluster" / "slurm.sbatch", "job.toml", cwd=tmp_path)
