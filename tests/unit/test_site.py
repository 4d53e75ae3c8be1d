"""The site of the documents: every page is in its list, and links lead to pages or to nothing."""

import runpy
import subprocess
from pathlib import Path

import pytest
import yaml

import rdpo

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "site"
STAGE = runpy.run_path(str(SITE / "stage.py"))
PAGE, STAGED = Path("docs/own.md"), {Path("docs/own.md"), Path("docs/data.md"), Path("jobs/README.md"), Path("a.png")}


def pages_of(entries):
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages_of(value)


def test_every_document_is_a_page_of_the_site_once():
    command = [*STAGE["GIT"], "ls-files", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = [name for name in listed.split() if not name.startswith(".github")]
    nav = list(pages_of(yaml.safe_load((SITE / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert len(nav) == len(set(nav)) > 15
    assert set(nav) == {*wanted, "docs/site/api.md"}


@pytest.mark.parametrize(
    ("link", "url", "becomes"),
    [
        ("[data](data.md#pairs)", None, "[data](data.md#pairs)"),
        ("[jobs](../jobs)", None, "[jobs](../jobs/README.md)"),
        ("[jobs](../jobs/#x)", "https://host/blob/main", "[jobs](../jobs/README.md#x)"),
        ("[code](../rdpo/api.py)", None, "code"),
        ("[code](../rdpo/api.py)", "https://host/blob/main/", "[code](https://host/blob/main/rdpo/api.py)"),
        ("![picture](../a.png)", None, "![picture](../a.png)"),
        ("[paper](https://arxiv.org/abs/1)", None, "[paper](https://arxiv.org/abs/1)"),
        ("```toml\nx = 1 # [a](b.md)\n```", None, "```toml\nx = 1 # [a](b.md)\n```"),
        ("[here](#below)", None, "[here](#below)"),
    ],
)
def test_a_link_leads_to_a_page_or_to_the_repository(link, url, becomes):
    assert STAGE["with_links"](link, PAGE, STAGED, url) == becomes


def test_what_the_documents_link_to_is_there():
    staged = STAGE["documents"]()
    assert Path("jobs/quickstart/report.png") in staged
    for page in (path for path in staged if path.suffix == ".md"):
        for _, _, target, _ in STAGE["LINK"].findall((ROOT / page).read_text(encoding="utf-8")):
            assert "://" in target or (ROOT / page.parent / target).exists(), f"{page}: {target}"


def test_the_citation_has_the_version_of_the_package():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == rdpo.__version__
