"""Runs as a live page shows them: how far they have come, and their reports as far as there is something to report.

Nothing is written. What is made of files is kept until they change, and making it anew rests for several times as long
as it took, so that whoever watches a run takes little of the machine that it runs on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import quote

from markupsafe import Markup

from rdpo.errors import InputError
from rdpo.execution.lock import holder
from rdpo.execution.reader import JOB_FILE, RunReader, inner_runs, job_of_run
from rdpo.files.folder import TEMPORARY, Folder, Stamp
from rdpo.inspection.status import RunStatus, StageStatus, facts, status_of
from rdpo.records import digest
from rdpo.report.page import REPORT, rendered
from rdpo.report.report import report_content
from rdpo.report.samples import Conversation, newest_rows
from rdpo.stages.table import names_of, stages_of

ARMS = "arms"
FILES = (REPORT, "comparison.csv", "heldout.csv")
PAUSE = 4.0
"""How long making something rests, in the time that it took."""
LOOK_S, LOOK_PAUSE = 1.0, 10.0
"""Files are looked at once in so many seconds; where a look takes long, after a pause of so many times as long."""
HALF_MADE = ("in progress", "interrupted")

T = TypeVar("T")
Key = str | int


class Kept(Generic[T]):
    """A value that is made anew when its key is another one, but not again before a pause."""

    def __init__(self, pause: float = PAUSE):
        self._held: tuple[Key, T] | None = None
        self._pause, self._rests_until = pause, 0.0

    def key_for(self, key: Key) -> Key:
        """The key of the value that `get` would give now."""
        rests = time.monotonic() < self._rests_until
        return self._held[0] if self._held and rests else key

    def get(self, key: Key, make: Callable[[], T]) -> tuple[Key, T]:
        """The value, made now where that is due, with its key."""
        if self._held and self.key_for(key) == self._held[0]:
            return self._held
        began = time.monotonic()
        try:
            self._held = (key, make())
        finally:
            now = time.monotonic()
            self._rests_until = now + self._pause * (now - began)
        return self._held


@dataclass(frozen=True)
class Body:
    """A page without what is said of the progress, which stands between these two."""

    header: Markup
    sections: Markup = field(default_factory=Markup)


@dataclass(frozen=True)
class Progress:
    """How far one run has come, as it stands in a page; with a `link` in one line that leads to its page."""

    name: str
    now: str
    finished: bool
    stages: list[dict[str, Any]]
    link: str = ""


class View(Protocol):
    """What a page shows."""

    title: str

    def key(self) -> str:
        """What is another one as soon as the body would be."""

    def statuses(self) -> list[RunStatus]:
        """How far each run has come."""

    def progress(self) -> list[Progress]:
        """The same as it stands in the page."""

    def body(self) -> Body:
        """All else, made anew."""


class LiveRun:
    """One run, or one round.

    Raises:
        InputError: there is no run in this directory.
    """

    def __init__(self, run_dir: str):
        self.dir = run_dir.rstrip("/")
        self.title = job_of_run(run_dir).name
        self._stamps: Kept[dict[str, dict[str, Stamp]]] = Kept(LOOK_PAUSE)
        self._driver: Kept[str | None] = Kept(LOOK_PAUSE)
        self._status: Kept[RunStatus] = Kept()
        self._status_at = 0.0
        self._parts: dict[str, Kept[Any]] = {}

    def key(self) -> str:
        """A hash of the names, sizes and times of the files that the page is made of."""
        return digest(self._looked())

    def statuses(self) -> list[RunStatus]:
        """How far the run has come; how long ago its stages were begun is counted on."""
        _, driver = self._driver.get(_moment(), lambda: holder(self.dir))
        _, status = self._status.get(digest(self.key(), driver), self._status_now)
        since = time.time() - self._status_at
        return [replace(status, stages=[_aged(stage, since) for stage in status.stages])]

    def progress(self) -> list[Progress]:
        """Its stages."""
        return [progress_of(status) for status in self.statuses()]

    def body(self) -> Body:
        """Its report, and the newest rows of the stages that write them now."""
        run = RunReader(self.dir)
        content = {**report_content(run, self.keep), "newest": dict(_newest(run)), "live": True}
        return Body(rendered("run_header.html.jinja", **content), rendered("run.html.jinja", **content))

    def keep(self, stage: str, make: Callable[[], T], /) -> T:
        """What is made of a stage's files and of the job, anew only if these have changed."""
        stamps = self._looked()
        kept: Kept[T] = self._parts.setdefault(stage, Kept(pause=0.0))
        return kept.get(digest(stamps.get(stage), stamps.get(JOB_FILE)), make)[1]

    def _status_now(self) -> RunStatus:
        self._status_at = time.time()
        return status_of(RunReader(self.dir))

    def _looked(self) -> dict[str, dict[str, Stamp]]:
        return self._stamps.get(_moment(), self._look)[1]

    def _look(self) -> dict[str, dict[str, Stamp]]:
        """The stamps of the job's file and of all stages' files, by stage."""
        stages = names_of(job_of_run(self.dir))
        found: dict[str, dict[str, Stamp]] = {}
        for name, stamp in Folder(self.dir).stamps().items():
            place = name.partition("/")[0]
            if place in (JOB_FILE, *stages) and not name.endswith(TEMPORARY):
                found.setdefault(place, {})[name] = stamp
        return found


class LiveRuns:
    """Several runs in one directory: the rounds of a run, or the arms of a comparison. Each has a page of its own."""

    def __init__(self, run_dir: str):
        self.dir = run_dir.rstrip("/")
        self.title = self.dir.rsplit("/", 1)[-1]
        self._views: dict[str, View] = {}

    def views(self) -> dict[str, View]:
        """The runs so far by the paths of their pages."""
        for name in members(self.dir):
            if name not in self._views:
                self._views[name] = view_of(f"{self.dir}/{name}")
        return self._views

    def files(self) -> list[str]:
        """Names of what a comparison has left beside its arms."""
        folder = Folder(self.dir)
        return [name for name in FILES if folder.exists(name)]

    def key(self) -> str:
        """A hash of what there is beside the progress."""
        return digest(self.files())

    def statuses(self) -> list[RunStatus]:
        """How far each run has come, also those in a run of several rounds."""
        return [status for view in self.views().values() for status in view.statuses()]

    def progress(self) -> list[Progress]:
        """A line for each of them."""
        lines = []
        for name, view in self.views().items():
            now = "; ".join(map(in_short, view.statuses())) or "not begun"
            lines.append(Progress(name, now, False, [], f"{quote(name)}/"))
        return lines

    def body(self) -> Body:
        """Their common name."""
        return Body(
            rendered("runs_header.html.jinja", title=self.title, run_dir=self.dir, report=REPORT in self.files())
        )


def _moment() -> int:
    """The same number for as long as nobody looks again."""
    return int(time.monotonic() / LOOK_S)


def members(run_dir: str) -> list[str]:
    """Paths, below a directory, of the rounds, types or arms in it so far; none where it holds a single run.

    Raises:
        InputError: there is nothing of the kind here.
    """
    folder = Folder(run_dir)
    if not folder.exists(JOB_FILE) and folder.exists(ARMS):
        arms = [f"{ARMS}/{name}" for name in Folder(f"{run_dir}/{ARMS}").entries()]
        return [arm for arm in arms if folder.exists(f"{arm}/{JOB_FILE}")]
    return [name for name in inner_runs(job_of_run(run_dir)) if folder.exists(f"{name}/{JOB_FILE}")]


def view_of(run_dir: str) -> View:
    """What there is to show of a directory.

    Raises:
        InputError: it holds neither a run nor a comparison.
    """
    several = not Folder(run_dir).exists(JOB_FILE) and Folder(run_dir).exists(ARMS)
    return LiveRuns(run_dir) if several or inner_runs(job_of_run(run_dir)) else LiveRun(run_dir)


def one_run(run_dir: str) -> LiveRun:
    """A run that has a single report.

    Raises:
        InputError: the directory holds none, or several.
    """
    view = view_of(run_dir)
    if isinstance(view, LiveRun):
        return view
    first = next(iter(members(run_dir)), "rounds/1")
    raise InputError(f"{run_dir}: holds several runs; name one of them, as in {run_dir}/{first}")


def progress_of(status: RunStatus, name: str = "") -> Progress:
    """A run's stages as they stand in a page."""
    stages = [
        {"stage": one.stage, "state": one.state, "share": _share(one), "facts": facts(one)} for one in status.stages
    ]
    return Progress(name, in_short(status), _is_finished(status), stages)


def in_short(status: RunStatus) -> str:
    """How far a run has come, in one line."""
    if _is_finished(status):
        return f"finished: all {len(status.stages)} stages are done"
    done = sum(stage.state == "done" for stage in status.stages)
    parts = [f"{done} of {len(status.stages)} stages done"]
    begun = [stage for stage in status.stages if stage.state in HALF_MADE]
    parts += [f"{stage.stage} {stage.state}: {', '.join(facts(stage)) or 'begun'}" for stage in begun]
    if not status.driver:
        parts.append("nobody works in it")
    elif not begun:
        parts.append(f"held by {status.driver}")
    return "; ".join(parts)


def _is_finished(status: RunStatus) -> bool:
    return all(stage.state == "done" for stage in status.stages)


def _share(stage: StageStatus) -> float | None:
    """How much of a stage is made, where that is known and not all of it."""
    if stage.state not in HALF_MADE or not stage.total:
        return None
    return min(1.0, stage.stored / stage.total)


def _aged(stage: StageStatus, seconds: float) -> StageStatus:
    if stage.state != "in progress" or stage.seconds is None:
        return stage
    return replace(stage, seconds=stage.seconds + seconds)


def _newest(run: RunReader) -> Iterator[tuple[str, list[Conversation]]]:
    """The newest rows of the stages in which models write and which are half made, the last stage first."""
    for stage in reversed(stages_of(run.job)):
        generates = stage.rows is not None and stage.rows.generates
        rows = newest_rows(run.folder(stage.name), run.job) if generates and not run.manifest(stage.name) else []
        if rows:
            yield stage.name, rows
