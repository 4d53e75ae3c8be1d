"""The command line: light to start, and its exit codes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rdpo.cli import main
from tests.support.jobs import write_job

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers")


def run(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


def test_import_and_help_are_light():
    code = f"import sys, rdpo, rdpo.cli, rdpo.config; print([m for m in {HEAVY} if m in sys.modules])"
    assert run("-c", code).stdout.strip() == "[]"
    result = run("-X", "importtime", "-m", "rdpo", "--help")
    assert result.returncode == 0
    assert "synthesize" in result.stdout
    assert not any(f" {name}\n" in result.stderr for name in HEAVY)


def exit_code(capsys, *arguments):
    code = main(list(arguments))
    return code, capsys.readouterr().err


def test_bad_input_is_exit_code_2_and_one_message(capsys, tmp_path, job_table):
    code, said = exit_code(capsys, "run", str(tmp_path / "none.toml"))
    assert (code, "no such job file" in said) == (2, True)
    job_table["student"]["model"] = "no/such-model"
    path = write_job(tmp_path / "job.toml", job_table)
    code, said = exit_code(capsys, "run", path, "--run-dir", str(tmp_path / "run"))
    assert code == 2
    assert "no/such-model" in said
    assert "Traceback" not in said


def test_run_directory_that_cannot_be_written(capsys, tmp_path, job_table):
    (tmp_path / "file").write_text("")
    path = write_job(tmp_path / "job.toml", job_table)
    code, said = exit_code(capsys, "run", path, "--run-dir", str(tmp_path / "file" / "run"))
    assert code == 2
    assert "cannot be written" in said


def test_second_driver_is_refused(capsys, tmp_path, job_table):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    path = write_job(tmp_path / "job.toml", job_table)
    with FileLock(tmp_path / "run" / ".lock"):
        code, said = exit_code(capsys, "run", path, "--run-dir", str(tmp_path / "run"))
    assert code == 2
    assert "another rdpo command" in said


def test_dry_run_prints_the_resolved_job_and_the_plan(capsys, tmp_path, job_table):
    path = write_job(tmp_path / "job.toml", job_table)
    assert main(["run", path, "--dry-run", "--set", "training.beta=0.3", "--run-dir", str(tmp_path / "r")]) == 0
    printed = capsys.readouterr().out
    assert "beta = 0.3" in printed
    assert "# synthesis   would run" in printed
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["trainn", "run"], "no command trainn (did you mean `train`?)"),
        (["show", "run", "trainnig"], "no stage trainnig (did you mean `training`?)"),
        (["run", "job.toml", "--until", "reward"], "no stage reward (did you mean `rewards`?)"),
        (["run", "job.toml", "--set", "training.loss=hnge"], "(did you mean `hinge`?)"),
        (["run", "job.toml", "--set", "rewards.0.kind=functoin"], "(did you mean `function`?)"),
        (["run", "job.toml", "--set", "rounds.watch=lengths"], "(did you mean `length`?)"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_one_that_was_meant(
    capsys, tmp_path, monkeypatch, job_table, arguments, meant
):
    monkeypatch.chdir(tmp_path)
    write_job("job.toml", job_table)
    code, said = exit_code(capsys, *arguments)
    assert (code, meant in said) == (2, True), said


def test_every_stage_reads_earlier_ones_and_has_a_command_of_its_own():
    from rdpo.stages.table import COMMANDS, NAMES, STAGES

    for place, stage in enumerate(STAGES):
        assert set(stage.inputs) <= set(NAMES[:place])
    assert len(set(NAMES)) == len(STAGES) == 16
    without = {"made", "prompts", "screening", "selection", "replay", "retention", "suites"}
    assert set(COMMANDS.values()) == set(NAMES) - without


def test_a_shell_completes_commands_options_stages_and_folders(tmp_path):
    script = run("-m", "rdpo", "completion", "bash").stdout
    function = re.search(r"complete .*-F (\w+) rdpo", script)[1]
    (tmp_path / "run").mkdir()
    (tmp_path / "rules.txt").touch()
    asked = {"rdpo tr": "train", "rdpo run --dr": "--dry-run", "rdpo show run tra": "training", "rdpo status r": "run"}
    for line, completed in asked.items():
        *_, before, word = words = line.split()
        call = (
            f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; {function} rdpo {word} {before}; echo ${{COMPREPLY[*]}}"
        )
        bash = subprocess.run(["bash", "-c", f"{script}\n{call}"], capture_output=True, text=True, cwd=tmp_path)
        assert bash.stdout.split() == [completed], bash
    assert "#compdef rdpo" in run("-m", "rdpo", "completion", "zsh").stdout


@pytest.mark.parametrize("command", ["synthesize", "train", "report"])
def test_stage_commands_need_a_run(capsys, tmp_path, command):
    code, said = exit_code(capsys, command, str(tmp_path))
    assert code == 2
    assert "config.toml" in said


def test_out_of_memory_is_one_message_with_remedies(capsys, tmp_path, job_table, monkeypatch):
    def crash(*_, **__):
        raise RuntimeError("Refer to the documentation on how to address the out of memory issue: ...")

    monkeypatch.setattr("rdpo.api.execute", crash)
    path = write_job(tmp_path / "job.toml", job_table)
    assert main(["run", path, "--run-dir", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("rdpo: a worker was killed: its machine ran out of memory; lower tokens_per_batch")


def test_after_starting_over_the_command_without_fresh_resumes(capsys, tmp_path, job_table, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rdpo.api.execute", interrupt)
    path = write_job(tmp_path / "job.toml", job_table)
    assert main(["run", path, "--run-dir", str(tmp_path / "run"), "--fresh"]) == 1
    assert "the same command without --fresh resumes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "file", "said"),
    [
        ("run", "rdpo/synthesis/tasks/roleplay.toml", "is a task, not a job; a job names it as synthesis.task"),
        ("plan", "rdpo/synthesis/tasks/roleplay.toml", "is a task, not a job; a job names it as synthesis.task"),
        ("run", "jobs/compare_small.toml", "is a comparison, not a job; `rdpo compare` takes it"),
        ("compare", "jobs/quickstart.toml", "is a job, not a comparison; `rdpo run` takes it"),
        ("compare", "rdpo/synthesis/tasks/roleplay.toml", "is a task, not a comparison; a job names it"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_the_command_that_takes_it(command, file, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main([command, file]) == 2
    assert capsys.readouterr().err.startswith(f"rdpo: {file}: {said}")


def test_a_job_in_place_of_a_task(capsys, tmp_path, job_table):
    job_table["synthesis"]["task"] = str(ROOT / "jobs/quickstart.toml")
    path = write_job(tmp_path / "job.toml", job_table)
    assert main(["run", path, "--run-dir", str(tmp_path / "run")]) == 2
    assert "quickstart.toml: is a job, not a task; `rdpo run` takes it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rewards.0.function=tests.rewards.length", "did you mean `tests.rewards:length`"),
        ("rewards.0.function=tests.rewards:lengths", "did you mean `length`"),
        ("synthesis.task=rolplay", "no such file \\(looked in .*\\); the tasks that come with rdpo are .*roleplay"),
        ("pairs.chosen=revised", "revised"),
        ("synthesis.task=task.toml", r"turns\.0\.usr: unknown key \(did you mean `user`\?\)"),
    ],
)
def test_a_dry_run_tries_functions_and_task(capsys, tmp_path, job_table, monkeypatch, override, said):
    (tmp_path / "task.toml").write_text('name = "t"\n[[turns]]\nname = "response"\nusr = "x"\n')
    path = write_job(tmp_path / "job.toml", job_table)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    assert main(["run", path, "--dry-run", "--set", override]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_an_error_of_a_worker_is_reported_by_its_cause():
    from rdpo.cli.failure import in_one_line

    text = (
        'ray::MapBatches()\n  File "x.py", line 3, in f\npyarrow.lib.ArrowTypeError: Could not convert\n\n'
        "The above exception was the direct cause of the following exception:\n\n"
        "ray.exceptions.UserCodeException: UDF failed to process a data block.\nTo change retry attempts, configure it."
    )
    assert in_one_line(RuntimeError(text)) == "pyarrow.lib.ArrowTypeError: Could not convert"
    assert in_one_line(ValueError("one\ntwo")) == "ValueError: two"


def test_what_a_library_says_of_engine_and_disk_is_reported_with_where_to_look():
    from rdpo.cli.failure import in_one_line

    assert "libraries.log" in in_one_line(RuntimeError("Engine core initialization failed. See root cause above."))
    assert in_one_line(OSError(28, "No space left on device", "x.parquet")).endswith("of Ray")
