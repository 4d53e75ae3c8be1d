"""One driver at a time in a run directory.

On a local disk it is a file lock, which ends with the process that holds it. An object store has none, so there each
driver puts a claim, an object of its own, and only then looks for others: of two that begin at the same time the one
that puts its claim last sees the other's, because what a store has taken it lists at once (S3, GCS and MinIO promise
that). Both may see each other; then both are refused, never both let in. The holder renews its claim; one that was
not renewed for `STALE_S` by the store's own clock, or whose process on this machine is gone, is passed over.

What remains: a holder that hangs for longer than `STALE_S` (a suspended machine, a store that it alone cannot reach)
loses the run, and notices only when it goes on. It stops then, but what it writes until its next renewal arrives. Its
claim is marked as taken by an object beside it, which no renewal of its own can undo.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from rdpo.cluster.interruption import heed_sigterm
from rdpo.errors import InputError
from rdpo.files.folder import Folder
from rdpo.files.stores import is_remote, store_trouble
from rdpo.records import digest

LOCK = ".lock"
TAKEN = ".taken"
RENEW_S = 10.0
STALE_S = 60.0
# `holder` has the file lock for a moment.
LOOK_S = 1.0

Say = Callable[[str], None]


@contextmanager
def held(run_dir: str, say: Say = print) -> Iterator[None]:
    """Hold a run directory while the context lasts; `say` hears of a driver that was passed over.

    Raises:
        InputError: it cannot be written, another driver holds it, or has taken it from this one.
    """
    with _claimed(run_dir, say) if is_remote(run_dir) else _file_locked(Path(run_dir)):
        yield


def holder(run_dir: str) -> str | None:
    """Who works in a run at this moment, in words, or None; nothing is written.

    A file lock does not say whose it is. How old a claim in an object store is, this machine's clock says.
    """
    return Claim(run_dir).holder() if is_remote(run_dir) else _file_holder(Path(run_dir) / LOCK)


def _file_holder(path: Path) -> str | None:
    if not path.exists():
        return None
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return "an rdpo command"
    return None


@contextmanager
def _file_locked(path: Path) -> Iterator[None]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK, timeout=LOOK_S)
        lock.acquire()
    except Timeout:
        raise InputError(f"{path}: another rdpo command works in this run; wait for it or end it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --run-dir") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _claimed(run_dir: str, say: Say) -> Iterator[None]:
    heed_sigterm()
    try:
        claim = Claim(run_dir)
        claim.take(say)
    except OSError as error:
        raise InputError(f"{run_dir}: {store_trouble(error) or error}; the same command resumes later") from None
    try:
        with claim.renewed():
            yield
    except BaseException:
        if claim.lost:
            raise InputError(f"{run_dir}: another rdpo command took over this run, as this one was silent") from None
        raise
    finally:
        claim.release()


class Claim:
    """A driver's object in the lock folder of a run."""

    def __init__(self, run_dir: str):
        self.folder, self.run_dir = Folder(f"{run_dir.rstrip('/')}/{LOCK}"), run_dir
        self.name = f"{uuid.uuid4().hex}.json"
        self.lost = False
        self._stop = threading.Event()

    def take(self, say: Say) -> None:
        """Put the claim, and pass over those of drivers that are gone.

        Raises:
            InputError: another driver holds the run.
        """
        self._put()
        for name, silent in self._others().items():
            holder = self._holder(name)
            if holder and silent < STALE_S and not _gone(holder):
                self.release()
                raise InputError(
                    f"{self.run_dir}: another rdpo command works in this run ({_named(holder)}); wait for it or end "
                    f"it; one that died elsewhere no longer counts after {STALE_S:.0f} s"
                )
            if holder and not _gone(holder):
                self.folder.write_bytes(name + TAKEN, b"{}")
            self._remove(name)
            if holder:
                say(f"took over from {_named(holder)}, which has ended or not been heard of for {silent:.0f} s")

    def holder(self) -> str | None:
        """Whose claim counts at this moment, of whoever has put one."""
        now = datetime.now(UTC)
        for name, written in self._listed().items():
            claim = self._holder(name)
            if claim and (now - written).total_seconds() < STALE_S and not _gone(claim):
                return _named(claim)
        return None

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the claim while the context lasts; interrupt the main thread if it is lost."""
        thread = threading.Thread(target=self._renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def release(self) -> None:
        """Remove the claim; where the store cannot be reached it grows stale."""
        with contextlib.suppress(OSError):
            self._remove(self.name)
            if self.lost:
                self._remove(self.name + TAKEN)

    def _renew(self) -> None:
        heard = time.monotonic()
        while not self._stop.wait(RENEW_S):
            try:
                if not self.folder.exists(self.name) or self.folder.exists(self.name + TAKEN):
                    break
                self._put()
                heard = time.monotonic()
            except OSError:
                if time.monotonic() - heard > STALE_S:
                    break
        else:
            return
        self.lost = True
        # A real signal: it also ends a wait that looks at nothing. SIGINT may be ignored in the background.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _put(self) -> None:
        process = psutil.Process()
        who = {"host": socket.gethostname(), "pid": process.pid, "began": process.create_time(), "machine": _machine()}
        # Of one length, so that a reader who meets a renewal half way still reads a claim.
        renewed = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.folder.write_json(self.name, {**who, "run": self.name.removesuffix(".json"), "renewed": renewed})

    def _others(self) -> dict[str, float]:
        """The other claims, and by how many seconds each is older than this one."""
        written = self._listed()
        if self.name not in written:
            raise InputError(f"{self.run_dir}: the store does not list what it has taken; runs cannot be locked in it")
        now = written.pop(self.name)
        return {name: (now - when).total_seconds() for name, when in written.items()}

    def _listed(self) -> dict[str, datetime]:
        """The claims that nobody has taken, and when the store says that they were written."""
        if not self.folder.fs.exists(self.folder.root):
            return {}
        found = self.folder.fs.ls(self.folder.root, detail=True)
        written = {entry["name"].rsplit("/", 1)[1]: entry["mtime"] for entry in found if entry["type"] == "file"}
        return {name: when for name, when in written.items() if TAKEN not in name and name + TAKEN not in written}

    def _holder(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self.folder.read_bytes(name)))
        except FileNotFoundError:
            return None

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.folder.fs.rm_file(f"{self.folder.root}/{name}")


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"


def _gone(holder: dict[str, Any]) -> bool:
    """Whether a process of this machine has ended; of another machine's it cannot be said."""
    if holder["machine"] != _machine():
        return False
    try:
        return bool(psutil.Process(holder["pid"]).create_time() != holder["began"])
    except psutil.NoSuchProcess:
        return True


def _machine() -> str:
    """This start of this machine, and the space in which its process ids count; random where neither is known."""
    try:
        return digest(Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid"))
    except OSError:
        return uuid.uuid4().hex
