"""Run directories and inputs in an object store: an S3 server on loopback, also one that fails, and real kills."""

import csv
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rdpo.cli import main
from rdpo.errors import InputError
from rdpo.execution import lock
from rdpo.files import stores
from rdpo.files.folder import Folder
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder
from tests.support.jobs import ALL_STAGES, valid_job, write_job, write_jsonl
from tests.support.stores import SECRET, FlakyProxy, client, environment, keys

ROOT = Path(__file__).parents[2]
PATIENCE = 1200
CLOSED = "http://127.0.0.1:9"
ROWS = [
    {"prompt_id": "a", "x_tokens": 3, "dropped": None},
    {"prompt_id": "b", "x_tokens": 4, "dropped": "too long"},
    {"prompt_id": "c", "x_tokens": 5, "dropped": None},
]


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path):
    """Address of an empty run directory."""
    if request.param == "disk":
        return str(tmp_path / "run")
    return f"s3://{request.getfixturevalue('bucket')}/some/run"


def manifest(key="k"):
    return Manifest("stage", key, {}, {})


def begun(place, name="stage", key="k"):
    folder = StageFolder(place, name)
    folder.begin(key)
    return folder


def write(folder, rows=ROWS):
    return folder.write_parts(pa.Table.from_pylist(rows), "prompt_id")


def test_what_is_written_is_counted_listed_and_committed(place):
    folder = begun(place)
    write(folder)
    write(folder, ROWS[::-1])
    assert [name.split("-")[0] for name in folder.files()] == ["dropped/part", "in_progress.json", "part"]
    assert (folder.count(), folder.count("dropped"), folder.total("_tokens")) == (2, 1, 8)
    assert folder.manifest() is None
    committed = folder.commit(manifest(), "prompt_id", expected=3)
    assert (committed.rows_in, committed.rows_out, committed.dropped) == (3, 2, {"too long": 1})
    again = StageFolder(place + "/", "stage")
    assert again.manifest() == committed
    assert sorted(again.table()["prompt_id"].to_pylist()) == ["a", "c"]


def test_an_interrupted_stage_keeps_its_parts_for_the_same_key_only(place):
    write(begun(place))
    resumed = begun(place)
    assert sorted(resumed.done_ids("prompt_id").to_pylist()) == ["a", "b", "c"]
    attempt = resumed.attempt_id
    other = begun(place, key="other")
    assert other.files() == ["in_progress.json"]
    assert other.attempt_id != attempt


def test_taking_over_copies_everything_and_shares_nothing(place):
    source = begun(place)
    write(source)
    committed = source.commit(manifest(), "prompt_id", expected=3)
    taken = begun(place, "taken", "old")
    write(taken, [{**ROWS[0], "prompt_id": "z"}])
    taken.take_over(source)
    assert taken.manifest() == committed
    assert taken.files() == source.files()
    taken.clear()
    assert source.table() == StageFolder(place, "stage").table()
    assert source.count() == 2


def test_clearing_leaves_neighbours_alone(place):
    folder, neighbour = begun(place), begun(place, "stage2")
    write(folder)
    write(neighbour)
    folder.clear()
    assert (folder.files(), folder.parts(), folder.exists("in_progress.json")) == ([], [], False)
    assert neighbour.count() == 2
    Folder(place).empty(keep={"stage2"})
    assert Folder(place).files() == neighbour_files(neighbour)


def neighbour_files(neighbour):
    return [f"stage2/{name}" for name in neighbour.files()]


def test_a_folder_that_is_made_again_is_never_read_from_an_old_copy(place, tmp_path, monkeypatch):
    monkeypatch.setenv("RDPO_CACHE", str(tmp_path / "cache"))
    folder = begun(place)
    for text in ("old", "new"):
        with folder.made("model") as made:
            (made / "weights").write_text(text)
            (made / "below").mkdir(exist_ok=True)
            (made / "below" / "config").write_text("{}")
        assert (Path(folder.local("model")) / "weights").read_text() == text
        assert (Path(folder.local("model")) / "below" / "config").read_text() == "{}"
    with folder.made("model", keep=True) as made:
        (made / "weights").write_text((made / "weights").read_text() + "er")
    assert (Path(folder.local("model")) / "weights").read_text() == "newer"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "only").write_text("this")
    folder.put(tmp_path / "source", "model")
    assert [path.name for path in Path(folder.local("model")).iterdir()] == ["only"]


def test_a_fetched_folder_is_fetched_once(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("RDPO_CACHE", str(tmp_path / "cache"))
    folder = begun(f"s3://{bucket}/run")
    folder.write_bytes("model/weights", b"some")
    first = Path(folder.local("model"))
    (first / "mark").write_text("")
    assert (Path(folder.local("model")) / "mark").is_file()


def test_what_failed_while_it_was_made_is_not_put_into_the_store(bucket):
    folder = begun(f"s3://{bucket}/run")
    with pytest.raises(RuntimeError), folder.made("model") as made:
        (made / "weights").write_text("half")
        raise RuntimeError
    assert folder.files() == ["in_progress.json"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "jsonl.gz", "jsonl.zst"])
def test_prompts_are_read_from_the_store_as_from_the_disk(bucket, tmp_path, ending):
    from rdpo.synthesis.sources import content_hash, read_rows, source_files

    rows = [{"prompt": f"question ä {index} " + "long " * 200, "split": "train"} for index in range(300)]
    local = tmp_path / f"prompts.{ending}"
    if ending.startswith("jsonl"):
        write_jsonl(tmp_path / "prompts.plain", rows)
        with pa.output_stream(local) as stream:
            stream.write((tmp_path / "prompts.plain").read_bytes())
    elif ending == "csv":
        with local.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "split"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), local)
    Folder(f"s3://{bucket}/in").write_bytes(local.name, local.read_bytes())
    (found,) = source_files(f"s3://{bucket}/in")
    assert found == f"s3://{bucket}/in/{local.name}"
    assert [row for _, row in read_rows(found)] == [row for _, row in read_rows(str(local))] == rows
    assert content_hash(f"s3://{bucket}/in") == content_hash(str(local))


@pytest.mark.parametrize("address", ["s3://key:hidden@bucket/run", "s3://bucket/run?secret_key=hidden"])
def test_a_key_in_an_address_is_refused_and_not_repeated(address):
    with pytest.raises(InputError, match="environment") as refused:
        Folder(address)
    assert "hidden" not in str(refused.value)


def test_a_key_in_a_job_is_refused_before_anything_is_written(capsys, tmp_path, job_table):
    job_table["prompts"]["source"] = "s3://key:hidden@bucket/prompts.jsonl"
    path = write_job(tmp_path / "job.toml", job_table)
    code, said = said_by(capsys, "run", path, "--run-dir", str(tmp_path / "run"))
    assert (code, "hidden" in said, "environment" in said, "prompts.source" in said) == (2, False, True, True)
    assert not (tmp_path / "run").exists()


def test_rows_are_shown(place, capsys):
    folder = begun(place, "pairs")
    write(
        folder,
        [{**ROWS[0], "prompt": [{"role": "user", "content": "a question"}], "defects": ["refusal", "duplicate"]}],
    )
    assert main(["show", place, "pairs"]) == 0
    said = capsys.readouterr().out
    assert "a question" in said
    assert "defects  refusal, duplicate" in said


def test_a_large_folder_is_listed_page_by_page(bucket, endpoint, port, reached):
    put = client(endpoint).put_object
    with ThreadPoolExecutor(8) as putters:
        for index in range(2001):
            putters.submit(put, Bucket=bucket, Key=f"run/stage/part-{index:04d}.parquet", Body=b"")
    with FlakyProxy(port, refuse=0, delay=0) as proxy:
        reached(proxy.endpoint)
        folder = StageFolder(f"s3://{bucket}/run", "stage")
        assert len(folder.parts()) == len(folder.files()) == 2001
        assert proxy.seen < 16


def test_a_stage_through_a_store_that_fails_now_and_then_is_whole(bucket, endpoint, port, reached):
    with FlakyProxy(port, refuse=3, delay=7) as proxy:
        reached(proxy.endpoint)
        folder = begun(f"s3://{bucket}/run")
        blocks = [[{**row, "prompt_id": f"{row['prompt_id']}{index}"} for row in ROWS] for index in range(12)]
        with ThreadPoolExecutor(4) as writers:
            list(writers.map(lambda rows: write(folder, rows), blocks))
        committed = folder.commit(manifest(), "prompt_id", expected=36)
        assert proxy.refused > 20
    reached(endpoint)
    direct = StageFolder(f"s3://{bucket}/run", "stage")
    assert direct.manifest() == committed
    assert sorted(direct.done_ids("prompt_id").to_pylist()) == sorted(
        row["prompt_id"] for rows in blocks for row in rows
    )


@pytest.fixture
def impatient(monkeypatch):
    """Few attempts, so that giving up is quick."""
    monkeypatch.setattr(stores, "ATTEMPTS", 2)
    stores._s3_at.cache_clear()
    yield
    stores._s3_at.cache_clear()


def test_a_store_that_cannot_be_reached_is_not_an_empty_one(reached, impatient):
    reached(CLOSED)
    folder = StageFolder("s3://bucket/run", "stage")
    for ask in (folder.parts, folder.files, folder.manifest, folder.count, lambda: folder.exists("x"), folder.clear):
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):
            ask()


def said_by(capsys, *arguments):
    code = main(list(arguments))
    return code, capsys.readouterr().err


def test_a_store_that_cannot_be_reached_is_one_message(reached, impatient, capsys, tmp_path, job_table):
    reached(CLOSED)
    path = write_job(tmp_path / "job.toml", job_table)
    code, said = said_by(capsys, "run", path, "--run-dir", "s3://bucket/run")
    assert code == 2
    assert said.count("\n") == 1
    assert said.startswith("rdpo: s3://bucket/run: the object store fails: AWS Error NETWORK_CONNECTION")
    assert "AWS_ENDPOINT_URL; the same command resumes later" in said
    assert SECRET not in said
    for command in (["report"], ["show", "prompts"], ["train"]):
        code, said = said_by(capsys, command[0], "s3://bucket/run", *command[1:])
        assert (code, said.count("\n"), "the object store fails" in said) == (1, 1, True)


def test_a_bucket_that_is_not_there_is_one_message(bucket, capsys, tmp_path, job_table):
    path = write_job(tmp_path / "job.toml", job_table)
    code, said = said_by(capsys, "run", path, "--run-dir", "s3://no-such-bucket/run")
    assert (code, said.count("\n")) == (2, 1)
    assert "create the bucket, or correct its name" in said


def test_a_store_that_goes_away_in_the_middle_is_one_message(
    bucket, port, reached, impatient, capsys, tmp_path, job_table, monkeypatch
):
    monkeypatch.setenv("RDPO_CACHE", str(tmp_path / "cache"))
    path = write_job(tmp_path / "job.toml", job_table)
    with FlakyProxy(port, refuse=0, delay=0) as proxy:
        reached(proxy.endpoint)

        def leave(run, stages):
            proxy.refuse = 1
            write(begun(run.dir))

        monkeypatch.setattr("rdpo.api.run_stages", leave)
        code, said = said_by(capsys, "run", path, "--run-dir", f"s3://{bucket}/run")
    assert code == 1
    assert said.startswith("rdpo: the object store fails: AWS Error")
    assert "the same command resumes where it stopped; details in" in said
    assert "Traceback" not in said


def command(job_path, run_dir, *more):
    return [sys.executable, "-m", "rdpo", "run", job_path, "--run-dir", run_dir, *more]


def run(environ, job_path, run_dir, *more):
    ended = subprocess.run(
        command(job_path, run_dir, *more), cwd=ROOT, env=environ, capture_output=True, text=True, timeout=PATIENCE
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr + logs_of(environ)
    return ended.stdout + ended.stderr


def logs_of(environ):
    logs = [path.read_text(errors="replace") for path in Path(environ["RDPO_CACHE"]).rglob("logs/**/*.log")]
    return "\n".join(log[-6000:] for log in logs)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_prompts_go_through_ray_and_a_store_that_fails_now_and_then(bucket, endpoint, port, tiny_model, tmp_path):
    table = valid_job(tiny_model, tmp_path)
    lines = (tmp_path / "prompts.jsonl").read_bytes()
    Folder(f"s3://{bucket}/in").write_bytes("prompts.jsonl", lines)
    table["prompts"]["source"] = f"s3://{bucket}/in/prompts.jsonl"
    path = write_job(tmp_path / "job.toml", table)
    with FlakyProxy(port, refuse=4, delay=5) as proxy:
        environ = {**os.environ, **environment(proxy.endpoint), "RDPO_CACHE": str(tmp_path / "cache")}
        run(environ, path, f"s3://{bucket}/run", "--until", "prompts")
        assert proxy.refused > 5
    folder = StageFolder(f"s3://{bucket}/run", "prompts")
    assert (folder.manifest().rows_in, folder.manifest().rows_out) == (12, 12)
    assert lock.holder(f"s3://{bucket}/run") is None


@pytest.fixture
def whole_job(wordy_models, bucket, tmp_path):
    table = valid_job(wordy_models[0], tmp_path)
    Folder(f"s3://{bucket}/in").write_bytes("prompts.jsonl", (tmp_path / "prompts.jsonl").read_bytes())
    table["prompts"]["source"] = f"s3://{bucket}/in/prompts.jsonl"
    table["pairs"] = {"direction": "reward"}
    table["training"] |= {"num_workers": 2, "epochs": 20, "checkpoint_every": 2, "lora": {"rank": 4}}
    return write_job(tmp_path / "job.toml", table)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(3 * PATIENCE)
def test_a_whole_run_killed_in_training_resumes_and_publishes(
    whole_job, bucket, endpoint, tmp_path, monkeypatch, capsys
):
    run_dir = f"s3://{bucket}/runs/tiny"
    environ = {**os.environ, **environment(endpoint), "RDPO_CACHE": str(tmp_path / "cache")}
    monkeypatch.setenv("RDPO_CACHE", environ["RDPO_CACHE"])
    kill_at_first_checkpoint(environ, whole_job, run_dir, endpoint, bucket, tmp_path / "killed.log")
    assert StageFolder(run_dir, "training").manifest() is None
    (first, *_) = steps_of(run_dir)
    before = {stage: StageFolder(run_dir, stage).manifest() for stage in ALL_STAGES[:6]}
    assert all(before.values())
    printed = run(environ, whole_job, run_dir)
    assert "took over from process" in printed
    assert f"model       {run_dir}/model" in printed
    assert {stage: StageFolder(run_dir, stage).manifest() for stage in ALL_STAGES[:6]} == before
    done = {stage: StageFolder(run_dir, stage).manifest() for stage in ALL_STAGES}
    assert all(done.values())
    steps = steps_of(run_dir)
    # With the seconds it took: a step that was made again would have others.
    assert steps[0] == first
    assert len(steps) == done["training"].summary["steps"] > 2
    assert run(environ, whole_job, run_dir).count("up to date") == len(ALL_STAGES)
    loads(Path(StageFolder(run_dir, "model").local()))
    assert main(["show", run_dir, "pairs", "--limit", "1"]) == 0
    assert main(["report", run_dir]) == 0
    assert main(["plan", whole_job, "--run-dir", run_dir]) == 0
    assert f"{run_dir}/report.html" in capsys.readouterr().out
    tells_no_secret(endpoint, bucket, tmp_path / "cache", printed)


def steps_of(run_dir):
    training = StageFolder(run_dir, "training")
    return training.read_bytes("metrics.jsonl").decode().splitlines() if training.exists("metrics.jsonl") else []


def kill_at_first_checkpoint(environ, job_path, run_dir, endpoint, bucket, log):
    """Kill -9 the driver as soon as the store has a checkpoint and the metrics of steps before it."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command(job_path, run_dir), cwd=ROOT, env=environ, stdout=output, stderr=output, start_new_session=True
        )
        deadline = time.monotonic() + PATIENCE
        checkpoints = "runs/tiny/training/checkpoints/"
        while not (
            any("checkpoint_manager_snapshot" in key for key in keys(endpoint, bucket, checkpoints))
            and steps_of(run_dir)
        ):
            assert process.poll() is None, log.read_text() + logs_of(environ)
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def loads(model_dir):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    expected = AutoModelForCausalLM.from_pretrained(model_dir)(**ids).logits
    adapter = AutoPeftModelForCausalLM.from_pretrained(str(model_dir / "adapter"))
    assert (adapter(**ids).logits - expected).abs().max() < 1e-3


def tells_no_secret(endpoint, bucket, cache, printed):
    assert SECRET not in printed
    reader = client(endpoint)
    for key in keys(endpoint, bucket):
        assert SECRET.encode() not in reader.get_object(Bucket=bucket, Key=key)["Body"].read(), key
    for path in cache.rglob("logs/**/*"):
        assert not path.is_file() or SECRET not in path.read_text(errors="replace"), path
