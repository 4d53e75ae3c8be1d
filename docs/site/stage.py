"""The documents, put together for the site: a folder that looks like the repository, with what is documentation in it.

    python docs/site/stage.py build/site-source [URL]

Links between the documents stay as they are. One to anything else goes to the repository at URL, for example
`https://github.com/OWNER/NAME/blob/main`; without it the words alone are left.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGED = (".md", ".toml", ".png", ".svg", ".jinja", ".json", ".yaml", ".py", ".sh", ".sbatch")
FOLDERS = ("docs", "jobs", "cluster")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
INDEX = "README.md"
GIT = ("git", "-c", "safe.directory=*")
"""Who owns the folder is no matter: its files are only listed."""


def documents() -> list[Path]:
    """What the site shows, and what its pages link to, relative to the repository."""
    listed = subprocess.run([*GIT, "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = [Path(name) for name in listed]
    return [file for file in files if file.suffix in STAGED and (file.parts[0] in FOLDERS or len(file.parts) == 1)]


def with_links(text: str, page: Path, staged: set[Path], url: str | None) -> str:
    """A page whose links lead somewhere: to another page of the site, or to the repository."""
    parts = FENCE.split(text)
    return "".join(
        part if number % 2 else LINK.sub(_link_of(page, staged, url), part) for number, part in enumerate(parts)
    )


def _link_of(page: Path, staged: set[Path], url: str | None) -> Callable[[re.Match[str]], str]:
    def replaced(match: re.Match[str]) -> str:
        picture, words, target, anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        place = Path(os.path.normpath(page.parent / target))
        if place in staged:
            return match[0]
        if place / INDEX in staged:
            return f"{picture}[{words}]({target.rstrip('/')}/{INDEX}{anchor or ''})"
        return f"[{words}]({url.rstrip('/')}/{place.as_posix()})" if url else words

    return replaced


def main() -> None:
    """Write the folder anew."""
    target, url = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 and sys.argv[2] else None
    shutil.rmtree(target, ignore_errors=True)
    staged = set(documents())
    for file in sorted(staged):
        place = target / file
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            text = (ROOT / file).read_text(encoding="utf-8")
            place.write_text(with_links(text, file, staged, url), encoding="utf-8")
        else:
            shutil.copy(ROOT / file, place)
    print(f"{sum(file.suffix == '.md' for file in staged)} pages -> {target}")


if __name__ == "__main__":
    main()
