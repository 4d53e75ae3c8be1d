"""Pages that need nothing else: model text is escaped, one script of our own may run, nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from rdpo.files.folder import Folder
from rdpo.records import shown, visible

REPORT = "report.html"
TEMPLATES = files("rdpo.report") / "templates"
SCRIPT = Markup((TEMPLATES / "samples.js").read_text(encoding="utf-8"))
LIVE_SCRIPT = Markup((TEMPLATES / "live.js").read_text(encoding="utf-8")) + SCRIPT


def write_page(run_dir: str, template: str, /, **content: Any) -> str:
    """Render a template as the report of a run directory; its path."""
    page = rendered(template, **content)
    # No file in UTF-8 takes half a character.
    Folder(run_dir).write_bytes(REPORT, page.encode("utf-8", "replace"))
    return f"{run_dir.rstrip('/')}/{REPORT}"


def rendered(template: str, /, **content: Any) -> Markup:
    """A template with its content; of a whole page, or of a part that another template takes in as it is."""
    return Markup(_environment().get_template(template).render(content))


def content_policy(script: str = "", live: bool = False) -> Markup:
    """A Content-Security-Policy under which a browser runs this script, if there is one, and loads nothing.

    The script of a `live` page may ask the server that the page is from, and nobody else.
    """
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'"
    if script:
        # By its hash: no other script that got into the page would run.
        known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{known}'"
    if live:
        policy += "; connect-src 'self'"
    return Markup(policy)


def escaped(text: str | None) -> Markup:
    """Model text as it stands in a page."""
    return escape(shown(text))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rdpo.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_written_out,
    )
    environment.globals["content_policy"] = content_policy
    environment.filters |= {"shown": shown, "clock": _clock}
    return environment


def _written_out(value: object) -> object:
    """Whatever a template prints, fit for a page; our own drawings as they are."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
