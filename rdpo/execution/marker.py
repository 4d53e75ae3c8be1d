"""What makes a directory a run's: a file of rdpo's own. A directory that holds other things is never written to."""

from __future__ import annotations

from rdpo.cluster.installed import versions
from rdpo.config import load_job
from rdpo.errors import InputError
from rdpo.execution.lock import LOCK, Say
from rdpo.execution.reader import JOB_FILE, MARKER, RUN_FORMAT, check_format
from rdpo.files.folder import IN_PROGRESS, MANIFEST, TEMPORARY, Folder

OWN = {MARKER, JOB_FILE, "logs", "report.html", "rounds", "steps", "types"}
"""What rdpo writes into a run directory beside the folders of stages."""


def take_directory(folder: Folder, fresh: bool, say: Say) -> None:
    """Make sure that a directory is a run's, or empty, and mark it; with `fresh`, remove what rdpo made in it.

    Raises:
        InputError: it holds other things, or a run of a newer rdpo.
    """
    _check_directory(folder)
    # First, so that a directory in which only other things are left, after an interruption, is still a run's.
    folder.write_json(MARKER, {"format": RUN_FORMAT, "rdpo": versions()["rdpo"]})
    if fresh:
        _start_over(folder, say)


def _check_directory(folder: Folder) -> None:
    entries = [name for name in folder.entries() if not _passing(name)]
    if MARKER in entries:
        check_format(folder)
        return
    if JOB_FILE in entries:
        _check_job(folder)
        return
    if entries:
        raise InputError(f"{folder.path}: holds {entries[0]} and no run of rdpo's; choose another --run-dir")


def _check_job(folder: Folder) -> None:
    """Runs had no marker at first; the job of such a one is a job."""
    try:
        load_job(f"{folder.path}/{JOB_FILE}")
    except InputError as error:
        raise InputError(
            f"{folder.path}: holds a {JOB_FILE} that is no job of rdpo's, and is left as it is; choose another "
            f"--run-dir ({str(error).splitlines()[0]})"
        ) from None


def _start_over(folder: Folder, say: Say) -> None:
    entries = folder.entries()
    others = {name for name in entries if not (_passing(name) or _is_own(folder, name))}
    for name in sorted(others):
        say(f"{folder.path}/{name} is not rdpo's and stays")
    folder.empty(keep={MARKER, *others, *filter(_passing, entries)})


def _is_own(folder: Folder, name: str) -> bool:
    return name in OWN or any(folder.exists(f"{name}/{file}") for file in (MANIFEST, IN_PROGRESS))


def _passing(name: str) -> bool:
    """Whether it is a lock, or a file that is being written."""
    return name.startswith(LOCK) or name.endswith(TEMPORARY)
