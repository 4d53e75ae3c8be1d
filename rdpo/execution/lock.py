"""One driver at a time in a run directory.

On a local disk it is a file lock, which ends with the process that holds it. In an object store it is one object,
`.lock`, that says who holds the run. It is only ever written on a condition: where there is none, or in the place of
the very one that was read (`files/conditional.py`). So of two that begin at the same time the store lets one in. The
holder renews the object; one that was not renewed for `STALE_S` by the store's own clock, or whose process on this
machine is gone, is taken over from, and then every renewal of the old holder is refused by the store.

A holder that hangs for longer than `STALE_S` (a suspended machine) and comes back is refused before it begins or
commits a stage, and is interrupted at its next renewal. What remains is what it writes until then: parts of rows and
checkpoints of the stage that it was making. No manifest of its own names them.
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
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock, Timeout

from rdpo.cluster.interruption import heed_sigterm
from rdpo.errors import InputError
from rdpo.files.conditional import Changed, ConditionalObject, Stored
from rdpo.files.folder import Folder
from rdpo.files.stores import is_remote, store_trouble
from rdpo.records import digest

if TYPE_CHECKING:
    from obstore import UpdateVersion

LOCK = ".lock"
CLOCK = f"{LOCK}-clock"
RENEW_S = 10.0
STALE_S = 60.0
# `holder` has the file lock for a moment.
LOOK_S = 1.0

Holder = dict[str, Any]
"""What a lock object says of the driver that holds it."""
Say = Callable[[str], None]
Check = Callable[[], None]
"""Asks whether a run is still held by this driver; an InputError if not."""


@contextmanager
def held(run_dir: str, say: Say = print) -> Iterator[Check]:
    """Hold a run directory while the context lasts; `say` hears of a driver that was taken over from.

    What it yields is to be called before anything is begun, removed or committed: it makes sure that no other driver
    has taken the run meanwhile.

    Raises:
        InputError: it cannot be written, another driver holds it, or has taken it from this one.
    """
    with _store_locked(run_dir, say) if is_remote(run_dir) else _file_locked(Path(run_dir)) as check:
        yield check


def holder(run_dir: str) -> str | None:
    """Who works in a run at this moment, in words, or None; nothing is written.

    A file lock does not say whose it is. How old a lock in an object store is, this machine's clock says.
    """
    return StoreLock(run_dir).holder() if is_remote(run_dir) else _file_holder(Path(run_dir) / LOCK)


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
def _file_locked(path: Path) -> Iterator[Check]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK, timeout=LOOK_S)
        lock.acquire()
    except Timeout:
        raise InputError(f"{path}: another rdpo command works in this run; wait for it or end it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --run-dir") from None
    try:
        # The system keeps the lock for as long as the process lives, also while it hangs.
        yield lambda: None
    finally:
        lock.release()


@contextmanager
def _store_locked(run_dir: str, say: Say) -> Iterator[Check]:
    heed_sigterm()
    try:
        # By the client that all else goes through: a store that it does not reach says so in the same words.
        Folder(run_dir).exists(LOCK)
        lock = StoreLock(run_dir)
        lock.take(say)
    except OSError as error:
        raise InputError(f"{run_dir}: {store_trouble(error) or error}; the same command resumes later") from None
    try:
        with lock.renewed():
            yield lock.check
    except BaseException:
        if lock.lost:
            raise lock.taken() from None
        raise
    finally:
        lock.release()


class StoreLock:
    """The lock object of a run in an object store, as one driver reads and writes it.

    Each driver that takes it has the number after the last one's: `token`.
    """

    def __init__(self, run_dir: str):
        self.run_dir = run_dir.rstrip("/")
        self.object = ConditionalObject(f"{self.run_dir}/{LOCK}")
        self.id = uuid.uuid4().hex
        self.token = 0
        self.lost = False
        self._version: UpdateVersion | None = None
        self._writing = threading.Lock()
        self._stop = threading.Event()

    def take(self, say: Say) -> None:
        """Write this driver into the lock, where nobody else holds it.

        Raises:
            InputError: another driver holds the run, or the store keeps no conditions.
        """
        found = self.object.read()
        before = _content(found)
        silent = self._silent(found) if found and "pid" in before else 0.0
        if "pid" in before and silent < STALE_S and not _gone(before):
            raise self._refused(before)

        self.token = int(before.get("token", 0)) + 1
        try:
            content = self._mine()
            self._version = self.object.replace(content, found.version) if found else self.object.create(content)
        except Changed:
            raise self._refused(_content(self.object.read())) from None
        self._try_conditions()
        if "pid" in before:
            say(f"took over from {_named(before)}, which has ended or not been heard of for {silent:.0f} s")

    def holder(self) -> str | None:
        """Who holds the lock at this moment."""
        found = self.object.read()
        content = _content(found)
        if found is None or "pid" not in content or _gone(content):
            return None
        return _named(content) if (datetime.now(UTC) - found.written).total_seconds() < STALE_S else None

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the lock while the context lasts; interrupt the main thread if it is lost."""
        thread = threading.Thread(target=self._keep, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def check(self) -> None:
        """Renew the lock now: the store takes that from its holder alone.

        Raises:
            InputError: another driver has taken it.
        """
        try:
            self._renew()
        except Changed:
            raise self.taken() from None

    def release(self) -> None:
        """Say that nobody holds the run; where the store cannot be reached the lock grows stale."""
        with contextlib.suppress(OSError, Changed), self._writing:
            if self._version and not self.lost:
                # Not removed: that cannot be bound to a condition, and the next driver's number follows this one's.
                self.object.replace(_written({"token": self.token, "released": self.id}), self._version)
                self._version = None

    def taken(self) -> InputError:
        """What is said of a lock that another driver has taken."""
        return InputError(f"{self.run_dir}: another rdpo command took over this run, as this one was silent")

    def _keep(self) -> None:
        heard = time.monotonic()
        while not self._stop.wait(RENEW_S):
            try:
                self._renew()
                heard = time.monotonic()
            except Changed:
                break
            except OSError:
                if time.monotonic() - heard > STALE_S:
                    self.lost = True
                    break
        else:
            return
        # A real signal: it also ends a wait that looks at nothing. SIGINT may be ignored in the background.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _renew(self) -> None:
        with self._writing:
            if self.lost or self._version is None:
                raise Changed(self.object.address)
            try:
                self._version = self.object.replace(self._mine(), self._version)
            except Changed:
                self.lost = True
                raise

    def _try_conditions(self) -> None:
        """Whether the store refuses what it should: one that overlooks conditions would let everybody in."""
        stale = self._version
        if stale is None:
            raise RuntimeError("only a lock that is held can be tried")
        self._renew()
        for write in (self.object.create, lambda content: self.object.replace(content, stale)):
            try:
                write(self._mine())
            except Changed:
                continue
            raise InputError(
                f"{self.run_dir}: the store overlooks the conditions of a write (If-None-Match, If-Match), by which a "
                "run is locked; use a newer version of it, another store, or a run directory on a disk"
            )

    def _mine(self) -> bytes:
        process = psutil.Process()
        who = {"host": socket.gethostname(), "pid": process.pid, "began": process.create_time(), "machine": _machine()}
        renewed = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        # S3's tag of an object is a hash of its content, so no two writings may be alike.
        return _written({**who, "id": self.id, "token": self.token, "renewed": renewed, "writing": uuid.uuid4().hex})

    def _silent(self, found: Stored) -> float:
        """Seconds since the lock was written, by the store's own clock."""
        clock = ConditionalObject(f"{self.run_dir}/{CLOCK}-{self.id}")
        return (clock.stamp(b"{}") - found.written).total_seconds()

    def _refused(self, holder: Holder) -> InputError:
        who = f" ({_named(holder)})" if "pid" in holder else ""
        return InputError(
            f"{self.run_dir}: another rdpo command works in this run{who}; wait for it or end it; one that died "
            f"elsewhere no longer counts after {STALE_S:.0f} s"
        )


def _content(found: Stored | None) -> Holder:
    """What a lock object says; nothing where there is none."""
    return dict(json.loads(found.content)) if found else {}


def _written(content: Holder) -> bytes:
    return json.dumps(content, indent=2).encode()


def _named(holder: Holder) -> str:
    return f"process {holder['pid']} on {holder['host']}"


def _gone(holder: Holder) -> bool:
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
