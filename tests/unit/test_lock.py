"""One driver at a time in a run: on a disk by a file lock, in an object store by one object written on conditions."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rdpo.errors import InputError
from rdpo.execution import lock
from rdpo.files.conditional import Changed, ConditionalObject
from rdpo.files.folder import Folder
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder
from rdpo.files.stores import store_trouble
from tests.support.stores import FlakyProxy

ROOT = Path(__file__).parents[2]
MY_NAME = f"process {os.getpid()} on "


@pytest.fixture
def run_dir(bucket):
    return f"s3://{bucket}/some/run"


def content(run_dir):
    return json.loads(Folder(run_dir).read_bytes(lock.LOCK))


def taken(run_dir):
    driver = lock.StoreLock(run_dir)
    driver.take(print)
    return driver


def taken_on_another_machine(run_dir, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(lock, "_machine", lambda: "elsewhere")
        return taken(run_dir)


@pytest.fixture
def late(monkeypatch):
    """Whoever holds a run has been silent for too long."""

    def be():
        monkeypatch.setattr(lock, "STALE_S", -1.0)

    return be


def test_a_second_driver_is_refused_while_the_first_holds_the_run(run_dir):
    with lock.held(run_dir):
        with pytest.raises(InputError, match=f"another rdpo command works in this run \\({MY_NAME}"):
            lock.held(run_dir).__enter__()
        assert Folder(run_dir).files() == [lock.LOCK]
        assert str(lock.holder(run_dir)).startswith(MY_NAME)
    assert lock.holder(run_dir) is None
    with lock.held(run_dir):
        pass
    assert Folder(run_dir).files() == [lock.LOCK]


def test_each_driver_has_the_number_after_the_last_ones(run_dir):
    tokens = []
    for _ in range(3):
        with lock.held(run_dir):
            tokens.append(content(run_dir)["token"])
    assert tokens == [1, 2, 3]
    assert content(run_dir)["token"] == 3


@pytest.mark.parametrize("before", ["nothing", "free", "stale"])
def test_of_many_that_begin_at_once_one_is_let_in(run_dir, before, monkeypatch):
    if before == "free":
        taken(run_dir).release()
    if before == "stale":
        taken(run_dir)
        monkeypatch.setattr(lock, "_gone", lambda holder: holder["token"] == 1)
    drivers, ready = [lock.StoreLock(run_dir) for _ in range(6)], threading.Barrier(6)

    def enter(driver):
        ready.wait()
        try:
            driver.take(lambda text: None)
        except InputError as error:
            assert "another rdpo command works in this run" in str(error)
            return False
        return True

    with ThreadPoolExecutor(6) as starters:
        let_in = list(starters.map(enter, drivers))
    assert sum(let_in) == 1
    drivers[let_in.index(True)].check()
    for driver, entered in zip(drivers, let_in, strict=True):
        if not entered:
            with pytest.raises(InputError):
                driver.check()


def test_a_lock_that_is_not_renewed_is_taken_over_and_said(run_dir, monkeypatch, late):
    said = []
    silent = taken_on_another_machine(run_dir, monkeypatch)
    with pytest.raises(InputError, match="no longer counts after 60 s"):
        lock.held(run_dir, said.append).__enter__()
    assert lock.holder(run_dir)
    late()
    assert lock.holder(run_dir) is None
    with lock.held(run_dir, said.append), pytest.raises(InputError, match="another rdpo command took over this run"):
        silent.check()
    (line,) = said
    assert line.startswith(f"took over from {MY_NAME}")


def test_how_old_a_lock_is_the_stores_clock_says(run_dir, monkeypatch):
    taken_on_another_machine(run_dir, monkeypatch)
    monkeypatch.setattr(lock.time, "time", lambda: 0.0)
    with pytest.raises(InputError, match="another rdpo command works in this run"):
        taken(run_dir)
    assert Folder(run_dir).files() == [lock.LOCK]


def test_a_holder_that_died_on_this_machine_is_taken_over_from_at_once(run_dir):
    said = []
    code = f"from rdpo.execution.lock import StoreLock; StoreLock({run_dir!r}).take(print)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with lock.held(run_dir, said.append):
        assert len(said) == 1


def test_a_holder_from_whom_the_run_was_taken_stops(run_dir, monkeypatch, late):
    monkeypatch.setattr(lock, "RENEW_S", 0.05)
    other = lock.StoreLock(run_dir)

    def take():
        # A renewal may come between the look and the writing.
        while True:
            try:
                return other.take(print)
            except InputError:
                pass

    with pytest.raises(InputError, match="another rdpo command took over this run"), lock.held(run_dir):
        late()
        # The holder may hear of it, and be interrupted, before this returns.
        take()
        threading.Event().wait(60)
    assert content(run_dir)["id"] == other.id


def test_a_renewal_that_is_late_does_not_win_the_lock_back(run_dir, monkeypatch, late):
    silent = taken(run_dir)
    with monkeypatch.context() as later:
        later.setattr(lock, "STALE_S", -1.0)
        other = taken_on_another_machine(run_dir, monkeypatch)
    for _ in range(2):
        with pytest.raises(Changed):
            silent._renew()
    silent.release()
    assert content(run_dir)["id"] == other.id
    other.check()


def test_a_held_lock_is_renewed(run_dir, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_S", 0.05)
    with lock.held(run_dir):
        first = content(run_dir)
        while (now := content(run_dir))["writing"] == first["writing"]:
            pass
        same = {"renewed": 0, "writing": 0}
        assert {**now, **same} == {**first, **same}


def commit(folder, key, text, check):
    folder.write_bytes("weights", text)
    return folder.commit(Manifest("stage", key, {}, {}), check=check)


@pytest.mark.parametrize("other_committed", [True, False])
def test_a_holder_that_hung_and_comes_back_commits_nothing(run_dir, late, monkeypatch, other_committed):
    silent = taken(run_dir)
    begun = StageFolder(run_dir, "stage")
    begun.begin("old")
    late()
    other = taken_on_another_machine(run_dir, monkeypatch)
    theirs = StageFolder(run_dir, "stage")
    theirs.begin("new")
    committed = commit(theirs, "new", b"theirs", other.check) if other_committed else None
    with pytest.raises(InputError, match="another rdpo command took over this run, as this one was silent"):
        begun.commit(Manifest("stage", "old", {}, {}), check=silent.check)
    assert StageFolder(run_dir, "stage").manifest() == committed


def test_a_holder_that_hangs_between_its_check_and_its_commit_overwrites_nothing(run_dir, late, monkeypatch):
    silent = taken(run_dir)
    begun = StageFolder(run_dir, "stage")
    begun.begin("k")
    committed = []

    def check_and_hang():
        silent.check()
        if not committed:
            late()
            other = taken_on_another_machine(run_dir, monkeypatch)
            committed.append(commit(StageFolder(run_dir, "stage"), "k", b"theirs", other.check))

    with pytest.raises(InputError, match="another rdpo command took over this run"):
        commit(begun, "k", b"ours", check_and_hang)
    assert StageFolder(run_dir, "stage").manifest() == committed[0]


HOLDER = """
import sys
from rdpo.errors import InputError
from rdpo.execution import lock
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder

lock.RENEW_S, lock.STALE_S = 0.3, 3.0
folder = StageFolder(sys.argv[1], "stage")
try:
    with lock.held(sys.argv[1]) as check:
        folder.begin("old")
        print("holds", flush=True)
        try:
            sys.stdin.readline()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        folder.commit(Manifest("stage", "old", {}, {}), check=check)
        print("committed", flush=True)
except InputError as error:
    print(error, flush=True)
"""


def test_a_process_that_is_stopped_and_goes_on_is_refused_at_its_commit(run_dir, monkeypatch):
    """Nothing is pretended here: one process is stopped for longer than the lock is good for."""
    command = [sys.executable, "-c", HOLDER, run_dir]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as hung:
        assert hung.stdout.readline() == "holds\n"
        hung.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(lock, "RENEW_S", 0.3)
        monkeypatch.setattr(lock, "STALE_S", 3.0)
        with pytest.raises(InputError, match="another rdpo command works in this run"):
            lock.held(run_dir).__enter__()
        time.sleep(4)
        said = []
        with lock.held(run_dir, said.append) as check:
            theirs = StageFolder(run_dir, "stage")
            theirs.begin("new")
            hung.send_signal(signal.SIGCONT)
            printed, _ = hung.communicate("\n", timeout=60)
            committed = commit(theirs, "new", b"theirs", check)
    assert "another rdpo command took over this run, as this one was silent" in printed
    assert "committed" not in printed
    assert any(str(hung.pid) in line for line in said)
    assert StageFolder(run_dir, "stage").manifest() == committed


def test_what_a_hung_holder_left_in_that_moment_the_present_one_replaces(run_dir):
    folder = StageFolder(run_dir, "stage")
    folder.begin("new")
    folder.write_json("manifest.json", {"stage": "stage", "key": "old", "settings": {}, "inputs": {}})
    committed = commit(folder, "new", b"", lambda: None)
    assert StageFolder(run_dir, "stage").manifest() == committed


def test_a_store_that_overlooks_conditions_is_refused(bucket, port, reached):
    class Forgetful(FlakyProxy):
        def before_passing(self, handler):
            for name in ("If-Match", "If-None-Match"):
                del handler.headers[name]

    with Forgetful(port, refuse=0, delay=0) as proxy:
        reached(proxy.endpoint)
        with pytest.raises(InputError, match=r"overlooks the conditions of a write .*use a newer version of it"):
            lock.held(f"s3://{bucket}/run").__enter__()


def test_a_store_whose_answer_is_lost_is_not_taken_for_another_driver(bucket, port, reached):
    class Losing(FlakyProxy):
        puts = 0

        def after_passing(self, handler):
            self.puts += handler.command == "PUT"
            if handler.command == "PUT" and self.puts % 2:
                handler._answer(503, {}, b"")
                raise ConnectionAbortedError

    with Losing(port, refuse=0, delay=0) as proxy:
        proxy.server.handle_error = lambda *_: None
        reached(proxy.endpoint)
        with lock.held(f"s3://{bucket}/run") as check:
            check()
        assert proxy.puts > 4


def test_a_store_that_knows_no_conditions_is_refused():
    with pytest.raises(InputError, match=r"memory:// address: runs cannot be locked in such a store"):
        lock.held("memory://run").__enter__()


def test_odd_names_are_the_same_object_for_both_clients(bucket):
    folder = Folder(f"s3://{bucket}/a run#1/ä%20~{{x}}")
    ConditionalObject(folder.address("one")).create(b"this")
    assert folder.read_bytes("one") == b"this"


@pytest.mark.parametrize(("address", "remedy"), [("s3://no-such-bucket/x", "create the bucket")])
def test_what_a_store_says_comes_with_its_remedy(bucket, address, remedy):
    for ask in (ConditionalObject(address).read, lambda: ConditionalObject(address).create(b"")):
        with pytest.raises(OSError) as refused:
            ask()
        assert remedy in store_trouble(refused.value)


def test_on_a_disk_the_lock_ends_with_its_process(tmp_path):
    with lock.held(str(tmp_path / "run")) as check:
        check()
        assert lock.holder(str(tmp_path / "run")) == "an rdpo command"
        with pytest.raises(InputError, match="another rdpo command works in this run"):
            lock.held(str(tmp_path / "run")).__enter__()
    assert lock.holder(str(tmp_path / "run")) is None
