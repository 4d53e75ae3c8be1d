"""The pages of `rdpo watch` by their paths, and what their script asks for now and then."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from threading import Lock
from urllib.parse import quote

from rdpo.errors import InputError
from rdpo.files.folder import Folder
from rdpo.report.live import Body, Kept, LiveRuns, View, in_short, view_of
from rdpo.report.page import LIVE_SCRIPT, content_policy, rendered
from rdpo.report.side_by_side import LivePair

HTML, JSON, TEXT, CSV = (
    f"{kind}; charset=utf-8" for kind in ("text/html", "application/json", "text/plain", "text/csv")
)
STATE = "state"
LIVE_POLICY, PLAIN_POLICY = str(content_policy(LIVE_SCRIPT, live=True)), str(content_policy())


@dataclass(frozen=True)
class Answer:
    """What a request is answered with; `moved`: where else what was asked for is."""

    status: int
    content: bytes
    kind: str = TEXT
    policy: str = PLAIN_POLICY
    moved: str | None = None


def site_of(run_dirs: Sequence[str]) -> Site:
    """The pages of one run, of several in one directory, or of two side by side.

    Raises:
        InputError: a directory holds nothing of the kind.
    """
    if len(run_dirs) > 2:
        raise InputError(f"watch: {len(run_dirs)} run directories; give one, or two to see them side by side")
    return Site(LivePair((run_dirs[0], run_dirs[1])) if run_dirs[1:] else view_of(run_dirs[0]))


class Site:
    """Pages by their paths."""

    def __init__(self, view: View):
        self._view = view
        self._bodies: dict[str, Kept[Body]] = {}
        # Several viewers want the same at the same time, and matplotlib is not to be used by two threads.
        self._lock = Lock()

    def answer(self, path: str) -> Answer:
        """What stands at a path; nothing but pages, their states, and what a comparison has left beside its arms."""
        place, _, name = path.rpartition("/")
        with self._lock:
            view = self._view_at(place)
            if view and name in ("", STATE):
                return self._page(place, view) if not name else self._state(place, view)
            if isinstance(view, LiveRuns) and name in view.files():
                return _file(view, name)
            if self._view_at(path):
                return Answer(301, b"", moved=f"{quote(name)}/")
        return Answer(404, b"nothing is here\n")

    def _view_at(self, path: str) -> View | None:
        """The run, or runs, whose page is at a path: `/rounds/1` is below that of all rounds."""
        view, names = self._view, path.split("/")[1:]
        while names:
            below = view.views() if isinstance(view, LiveRuns) else {}
            if "/".join(names[:2]) not in below:
                return None
            view, names = below["/".join(names[:2])], names[2:]
        return view

    def _page(self, place: str, view: View) -> Answer:
        version, body = self._bodies.setdefault(place, Kept()).get(view.key(), view.body)
        page = rendered(
            "watch.html.jinja",
            live=True,
            script=LIVE_SCRIPT,
            title=view.title,
            now=_now(view),
            version=version,
            header=body.header,
            progress=_progress(view),
            sections=body.sections,
        )
        return Answer(200, page.encode("utf-8", "replace"), HTML, LIVE_POLICY)

    def _state(self, place: str, view: View) -> Answer:
        """Which version of the page there would be now, and how far the runs have come, in words and in figures."""
        state = {
            "version": self._bodies.setdefault(place, Kept()).key_for(view.key()),
            "now": _now(view),
            "progress": _progress(view),
            "runs": [asdict(status) for status in view.statuses()],
        }
        return Answer(200, json.dumps(state).encode(), JSON)


def _progress(view: View) -> str:
    return rendered("progress.html.jinja", runs=view.progress())


def _now(view: View) -> str:
    """How far it is, in one line."""
    statuses = view.statuses()
    if len(statuses) == 1:
        return in_short(statuses[0])
    working = sum(status.driver is not None for status in statuses)
    return f"{len(statuses)} runs, {working or 'none'} of them at work"


def _file(view: LiveRuns, name: str) -> Answer:
    content = Folder(view.dir).read_bytes(name)
    return Answer(200, content, HTML if name.endswith(".html") else CSV)
