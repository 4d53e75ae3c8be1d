"""How the `rdpo` command ends: with its own code, whatever native libraries do while the interpreter goes down."""

import os
import subprocess
import sys

import pytest

from tests.support.made_up import made_up_run

ABORTS = """
import atexit, os
atexit.register(os.abort)
"""
"""Registered before the command begins, and so called behind what it registers, as destructors are."""


def ended(folder, *arguments, stdout=subprocess.PIPE):
    (folder / "sitecustomize.py").write_text(ABORTS, encoding="utf-8")
    path = os.pathsep.join([str(folder), os.getcwd()])
    command = [sys.executable, "-m", "rdpo", *arguments]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=stdout, stderr=subprocess.PIPE, text=True
    )


def test_a_library_that_aborts_at_the_end_changes_neither_output_nor_code(job_table, tmp_path):
    run_dir = made_up_run(tmp_path / "run", job_table)
    done = ended(tmp_path, "show", run_dir, "pairs", "--limit", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Plain answer" in done.stdout

    wrong = ended(tmp_path, "show", str(tmp_path / "no-run"), "pairs")
    assert wrong.returncode == 2
    assert "no-run" in wrong.stderr


def test_what_is_registered_later_is_done_before(tmp_path):
    """As Ray's own end is."""
    code = "import atexit, rdpo.cli as cli; cli.main = lambda: atexit.register(print, 'done') and 3; cli.script()"
    (tmp_path / "sitecustomize.py").write_text(ABORTS, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (3, "done\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_output_that_cannot_be_written_is_no_success(job_table, tmp_path):
    run_dir = made_up_run(tmp_path / "run", job_table)
    with open("/dev/full", "w", encoding="utf-8") as full:
        assert ended(tmp_path, "show", run_dir, "pairs", "--limit", "1", stdout=full).returncode != 0
