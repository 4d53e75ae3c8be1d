"""Connecting to Ray: the token that lets code run on a cluster is its owner's alone; a slow start is made again."""

import stat
import subprocess
import sys

import pytest

from rdpo.cluster.connection import keep_token_private, start_local


@pytest.fixture
def token(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".ray" / "auth_token"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_token_is_readable_by_its_owner_alone(token):
    keep_token_private()
    assert (mode(token), mode(token.parent)) == (0o600, 0o700)
    assert len(token.read_text()) == 64
    assert list(token.parent.iterdir()) == [token]


@pytest.mark.parametrize("named", [False, True])
def test_a_token_that_all_can_read_is_closed_and_stays_the_same(token, monkeypatch, tmp_path, named):
    path = tmp_path / "own" if named else token
    if named:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    path.parent.mkdir(exist_ok=True)
    path.write_text("known")
    path.chmod(0o644)
    keep_token_private()
    assert (mode(path), path.read_text()) == (0o600, "known")
    assert token.exists() == (not named)


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_TOKEN", "given"), ("RAY_AUTH_MODE", "disabled")])
def test_no_token_is_written_where_none_is_read(token, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    keep_token_private()
    assert not token.exists()


class SlowRay:
    """A Ray whose processes do not start in time so often."""

    __file__ = "/packages/ray/__init__.py"

    def __init__(self, slow, message="The current node timed out during startup."):
        self.slow, self.message = slow, message
        self.starts, self.processes = [], []

    def init(self, **options):
        self.starts.append(options)
        self.start(self.__file__)
        # Of the program itself, by chance at the same time.
        self.start("another")
        if len(self.starts) <= self.slow:
            raise Exception(self.message)
        return "context"

    def start(self, name):
        command = [sys.executable, "-c", "input()", name]
        self.processes.append(subprocess.Popen(command, stdin=subprocess.PIPE))

    def shutdown(self):
        pass

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()


def test_a_ray_that_was_too_slow_to_start_is_started_again_alone():
    ray = SlowRay(2)
    assert start_local(ray, num_cpus=3) == "context"
    assert ray.starts == [{"address": "local", "num_cpus": 3}] * 3
    of_ray, others = ray.processes[::2], ray.processes[1::2]
    assert [process.wait(timeout=20) for process in of_ray[:2]] == [-9, -9]
    assert [process.poll() for process in (of_ray[2], *others)] == [None] * 4
    ray.end()


@pytest.mark.parametrize(("ray", "starts"), [(SlowRay(9), 3), (SlowRay(9, "no such address"), 1)])
def test_a_ray_that_does_not_start_is_said(ray, starts):
    with pytest.raises(Exception, match=ray.message):
        start_local(ray)
    assert len(ray.starts) == starts
    ray.end()
