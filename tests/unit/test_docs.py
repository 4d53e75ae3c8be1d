"""What the documents show is true: the job in the README is a whole one, its commands exist."""

import re
import tomllib
from pathlib import Path

import pytest

from rdpo.cli import main
from rdpo.config import Job

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_jobs_in_the_readme_are_whole():
    blocks = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    names = [Job.model_validate(tomllib.loads(block)).name for block in blocks]
    assert names == ["mine", "hosted", "preferences", "self"]


def test_every_job_is_in_the_table_of_jobs():
    told = (ROOT / "jobs" / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in (ROOT / "jobs").glob("*.toml") if f"`{path.name}`" not in told]


def test_commands_in_the_readme_exist(capsys):
    shell = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    commands = set(re.findall(r"^rdpo (\w+)", shell, re.MULTILINE))
    assert {"run", "show", "train"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0


def test_make_targets_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_file_for_clusters_is_in_their_table():
    told = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    files = [path.relative_to(ROOT / "cluster") for path in (ROOT / "cluster").rglob("*") if path.is_file()]
    assert not [path for path in files if path.parts[0] not in ("locks", "README.md") and f"`{path}`" not in told]


def test_links_in_the_documents_lead_somewhere():
    documents = ("README.md", "jobs/README.md", "cluster/README.md", "CONTRIBUTING.md", "SECURITY.md")
    for document in (ROOT / name for name in documents):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
