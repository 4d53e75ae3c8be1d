"""What a batch system starts on the nodes of a cluster: the Slurm script and the SkyPilot task, with stand-ins."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.support.linters import linted

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"

# Of a SkyPilot task, as its YAML specification lists them.
SKYPILOT = {"name", "num_nodes", "workdir", "resources", "envs", "secrets", "file_mounts", "run"}
SKYPILOT_RESOURCES = {"accelerators", "image_id", "disk_size", "network_tier"}


@pytest.fixture
def sky_task():
    return yaml.safe_load((CLUSTER / "skypilot.yaml").read_text(encoding="utf-8"))


def test_the_skypilot_task_names_image_storage_and_secrets_without_values(sky_task):
    assert set(sky_task) <= SKYPILOT and set(sky_task["resources"]) <= SKYPILOT_RESOURCES
    assert sky_task["resources"]["image_id"] == "docker:REGISTRY/rdpo:gpu"
    # Null: they are asked for at the launch.
    assert sky_task["secrets"] == {"HF_TOKEN": None, "RAY_AUTH_TOKEN": None}
    assert sky_task["file_mounts"]["/data"] == {"source": "s3://BUCKET/data", "mode": "MOUNT"}
    assert sky_task["envs"]["RUN_DIR"].startswith("s3://") and (ROOT / sky_task["envs"]["JOB"]).is_file()


SKY_STAND_INS = {
    "ray": """echo "$RAY_AUTH_MODE $*" >> "$LOG"
[[ $* == *--head* ]] || exit 0
trap 'echo ended >> "$LOG"; exit' TERM
while :; do sleep 0.02; done""",
    "python": """[[ $1 != -c ]] || until grep -q head "$LOG"; do sleep 0.02; done
echo "python $1 ${*: -1}" >> "$LOG"
""",
}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_skypilot_task_starts_a_ray_of_its_own_on_each_node(sky_task, tmp_path, rank):
    script = tmp_path / "run.sh"
    script.write_text("#!/bin/bash\n" + sky_task["run"])
    linted("shellcheck", str(script))
    (tmp_path / "bin").mkdir()
    for name, text in SKY_STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        **sky_task["envs"],
    }
    (tmp_path / "log").write_text("")
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, *rest = (tmp_path / "log").read_text().splitlines()
    assert "--num-gpus=8" in first and "trainer" in first and first.startswith("token start")
    if rank:
        assert "--address=10.0.0.1:6379" in first and not rest
    else:
        assert "--head --port=6379 --dashboard-host=127.0.0.1" in first
        assert rest[:2] == ["python -c 2", f"python -m {environment['RUN_DIR']}"]


STAND_INS = {
    "scontrol": """[[ $2 != hostnames ]] || printf 'one\\ntwo\\nthree\\n'
[[ $2 != node ]] || echo "   NodeAddr=${ADDRESS:-$3} NodeHostName=$3 Version=22"
[[ $1 != requeue ]] || echo "$@" >> "$LOG"
""",
    # A node stays until the job's end.
    "srun": """echo "$@" >> "$STEPS"
[[ -z ${NODE_FAILS:-} ]] || exit 1
until [[ -e $LOG.end ]]; do sleep 0.02; done""",
    # A wait for nodes does not end before so many steps have begun.
    "python": """[[ $1 != - ]] || until (($(wc -l < "$STEPS") >= $2)); do sleep 0.02; done
[[ $1 != - || -z ${NO_NODES:-} ]] || { touch "$LOG.waiting"; until [[ -e $LOG.end ]]; do sleep 0.02; done; }
echo "$(stat -c %a "${RAY_AUTH_TOKEN_PATH:-/dev/null}") ${RAY_ADDRESS:-} $*" >> "$LOG"
printf secret
[[ $1 != -m ]] || eval "${DRIVER:-true}"
""",
}
INTERRUPTED = "trap 'echo checkpoint >> $LOG; exit 130' TERM; touch $LOG.driver; while :; do sleep 0.02; done"
"""A driver that leaves a checkpoint where it is asked to stop."""


class SlurmJob:
    """The script itself, with stand-ins for the commands of Slurm and of the environment."""

    def __init__(self, place, **environment):
        self.place = place
        (place / "bin").mkdir()
        for name, text in STAND_INS.items():
            (place / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
            (place / "bin" / name).chmod(0o755)
        self.environment = {
            "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
            "VENV": str(place),
            "TOKEN_DIR": str(place),
            "LOG": str(place / "log"),
            "STEPS": str(place / "steps"),
            "TEACHERS": "1",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "one,two,three",
            "SLURM_JOB_CPUS_PER_NODE": "16(x2),8",
            **environment,
        }
        (place / "steps").write_text("")
        (place / "log").write_text("")

    def run(self, signal_at=None):
        """Run it, with SIGTERM once that file is there; exit code and errors."""
        script = ["bash", str(CLUSTER / "slurm.sbatch"), "job.toml", "--run-dir", "/shared/run"]
        with open(self.place / "errors", "w+") as errors:
            job = subprocess.Popen(script, env=self.environment, stdout=subprocess.DEVNULL, stderr=errors)
            if signal_at:
                wait_for(self.place / signal_at)
                job.terminate()
            try:
                code = job.wait(30)
            finally:
                (self.place / "log.end").touch()
            errors.seek(0)
            return code, errors.read()

    def log(self):
        return (self.place / "log").read_text().splitlines()

    def steps(self):
        """What `srun` was given, by node."""
        lines = (self.place / "steps").read_text().splitlines()
        return {line.split("--nodelist=")[1].split()[0]: line for line in lines}


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.02)


def test_a_slurm_job_starts_one_ray_node_on_each_and_hides_its_token(tmp_path):
    job = SlurmJob(tmp_path)
    code, errors = job.run()
    assert code == 0, errors
    making, first, waiting, driver = job.log()
    assert "token_hex" in making
    # The others start once the head is there.
    assert first == "600 one:20007 - 1"
    assert waiting == "600 one:20007 - 3"
    assert driver == "600 one:20007 -m rdpo run job.toml --run-dir /shared/run"
    assert not list(tmp_path.glob(".rdpo-token*"))
    steps = job.steps()
    assert "--head --port=20007 --dashboard-host=127.0.0.1 --dashboard-port=40007" in steps["one"]
    assert steps["one"].endswith("""--num-cpus=16 --resources={"teacher": 1, "reward": 1}""")
    for host, cores in (("two", 16), ("three", 8)):
        assert "--address=one:20007" in steps[host]
        assert f"--cpus-per-task={cores}" in steps[host]
        assert steps[host].endswith(f"""--num-cpus={cores} --resources={{"trainer": 1}}""")


def test_a_slurm_job_uses_the_addresses_by_which_slurm_knows_its_nodes(tmp_path):
    job = SlurmJob(tmp_path, ADDRESS="10.1.2.3")
    assert job.run()[0] == 0
    steps = job.steps()
    assert "--node-ip-address=10.1.2.3" in steps["one"] and "--node-ip-address=10.1.2.3" in steps["two"]
    assert "--address=10.1.2.3:20007" in steps["two"]


@pytest.mark.parametrize("requeue", ["0", "1"])
def test_sigterm_reaches_the_driver_of_a_slurm_job(tmp_path, requeue):
    job = SlurmJob(tmp_path, DRIVER=INTERRUPTED, REQUEUE=requeue)
    code, errors = job.run(signal_at="log.driver")
    assert code == 130, errors
    assert job.log()[4:] == ["checkpoint", "requeue 7"][: 1 + int(requeue)]
    assert not list(tmp_path.glob(".rdpo-token*"))


def test_sigterm_before_all_nodes_are_there_ends_a_slurm_job_at_once(tmp_path):
    job = SlurmJob(tmp_path, NO_NODES="1")
    code, errors = job.run(signal_at="log.waiting")
    assert code == 143 and "nothing was begun" in errors
    assert set(job.steps()) == {"one"}
    assert not any("-m rdpo" in line for line in job.log())


def test_a_node_that_fails_ends_a_slurm_job_at_once(tmp_path):
    job = SlurmJob(tmp_path, NO_NODES="1", NODE_FAILS="1")
    code, errors = job.run()
    assert code == 1 and "a Ray node ended" in errors
