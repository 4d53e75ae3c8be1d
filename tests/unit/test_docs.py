"""What the documents show is true: the job in the README is a whole one, its commands exist."""

import ast
import importlib
import json
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from rdpo.cli import main
from rdpo.config import LOSS_OPTIONS, Job, Loss, load_job
from rdpo.config.comparison import Comparison
from rdpo.config.manual import manual
from rdpo.preference.rewards.function import load_function
from rdpo.synthesis.instructions import check_fields, load_task
from tests.support.made_up import made_up_run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = [
    README,
    *((ROOT / "docs" / name).read_text() for name in ("gpu-job.md", "data.md", "compare.md", "clusters.md")),
]


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 150


def test_every_page_of_the_documents_is_in_the_readmes_list():
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert len(pages) > 10
    assert not [page for page in pages if f"(docs/{page})" not in README]


def test_every_page_of_results_is_in_their_list_and_in_the_readme():
    results = ROOT / "docs" / "results"
    listed = (results / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in results.glob("*.md")} - {"README.md"}
    assert "noise.md" in pages
    assert not [page for page in pages if f"({page})" not in listed]
    assert "(docs/results/README.md)" in README


def test_the_jobs_in_the_guide_are_whole():
    blocks = re.findall(r"```toml\n(.*?)```", "".join(GUIDE), re.DOTALL)
    names = [Job.model_validate(tomllib.loads(block)).name for block in blocks]
    assert names == ["mine", "large", "hosted", "from-sft", "preferences", "mixed", "safe", "self"]


def test_the_comparison_that_is_shown_is_one():
    page = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```\n(name = .*?)```", page, re.DOTALL)
    assert list(Comparison.model_validate(tomllib.loads(block)).arms) == ["dpo", "rdpo"]


def test_every_job_is_in_the_table_of_jobs():
    text = (ROOT / "jobs" / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in (ROOT / "jobs").glob("*.toml") if f"`{path.name}`" not in text]


def test_commands_in_the_guide_exist(capsys):
    shell = "".join(re.findall(r"```sh\n(.*?)```", "".join(GUIDE), re.DOTALL))
    commands = set(re.findall(r"^rdpo (\w+)", shell, re.MULTILINE))
    assert {"run", "show", "train"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0


def test_make_targets_in_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    for target in set(re.findall(r"`make ([a-z-]+)", README + pages)) | set(re.findall(r"^make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_reference_of_the_job_file_is_current():
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == manual(), "run `make docs`"


def test_every_field_of_a_job_has_a_type_and_a_meaning():
    rows = [line.strip("| ").split(" | ") for line in manual().splitlines() if line.startswith("| `")]
    fields = [row for row in rows if len(row) > 3]
    assert len(fields) > 100
    assert not [row for row in fields if not (row[1].strip() and row[-1].strip())]
    assert "| `rank` | whole number, at least 1 | `16` |" in manual()
    assert "| `num_workers` | whole number or list of 2 whole numbers, at least 1 | `1` |" in manual()


def test_every_loss_and_every_way_of_the_reward_has_its_equation():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    ways = get_args(Loss.model_fields["reward_as"].annotation)
    assert not [name for name in LOSS_OPTIONS if f"| `{name}` | " not in text]
    assert not [way for way in ways if way != "auto" and f'| `training.reward_as = "{way}"` |' not in text]


def test_the_map_of_the_house_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = [path.name for path in (ROOT / "rdpo").glob("*.py")]
    rooms = [f"rdpo/{path.parent.name}/" for path in (ROOT / "rdpo").glob("*/__init__.py")]
    assert not [name for name in modules + rooms if f"{name}`" not in text]


def test_the_messages_in_the_remedies_are_those_that_are_printed():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "rdpo").rglob("*.py")]
    # A text over several lines is one text; what a message has from elsewhere stands as `…` in the document.
    printed = re.sub(r"\{[^{}\n]*\}", "…", re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))).replace("`", "")
    remedies = (ROOT / "docs" / "remedies.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^> (.+)$|^\| (`.+`) \|", remedies, re.MULTILINE)
    messages = [message for line in quoted for message in re.findall(r"`([^`]+)`", "".join(line))]
    known = [message.removeprefix("warning: ") for message in messages]
    parts = [part.strip(" …0123456789.;:,") for message in known for part in message.split("…")]
    assert len(messages) > 30
    assert not [part for part in parts if len(part) > 9 and part not in printed]


def test_what_the_page_on_own_data_writes_is_a_job_that_scores_and_asks(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "own.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:json|python|toml)\n.*?```", page, re.DOTALL)
    names = ("prompts.jsonl", "my_rewards.py", "brief.toml", "first.toml")
    for name, block in zip(names, blocks, strict=True):
        (tmp_path / name).write_text("\n".join(block.splitlines()[1:-1]), encoding="utf-8")
        assert f"`{name}`" in page
    monkeypatch.chdir(tmp_path)
    job = load_job("first.toml")
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    check_fields(load_task(job.synthesis.task), {"prompt": [], "extra": json.dumps(rows[0])}, {})
    for reward in job.rewards:
        score = load_function(reward.function)
        worse, better = (score([], answer, {"extra": json.dumps(rows[0])}) for answer in ("- word\n" * 50, "A word."))
        assert better > worse


PYTHON = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_examples_in_python_run(job_table, tmp_path, monkeypatch, capsys):
    made_up_run(tmp_path / "runs" / "quickstart", job_table)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PYTHON, re.DOTALL):
        exec(block, names)
    printed = capsys.readouterr().out
    assert "win rate    1.000" in printed
    assert "0.5 0.1" in printed
    # The reward doubts the second pair, so that it counts less than an undecided one would.
    slopes = names["pairs"].chosen.grad
    assert slopes[0] < slopes[1] < 0


def test_what_the_examples_for_a_cluster_use_is_there():
    for block in re.findall(r"```python ray\n(.*?)```", PYTHON, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(importlib.import_module(node.module), one.name) for one in node.names)
    for home, name in re.findall(r"`(rdpo(?:\.\w+)+)\.(\w+)\((?:rows|job)", PYTHON):
        assert hasattr(importlib.import_module(home), name), name


def test_every_file_for_clusters_is_in_their_table():
    text = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    files = [path.relative_to(ROOT / "cluster") for path in (ROOT / "cluster").rglob("*") if path.is_file()]
    assert not [path for path in files if path.parts[0] not in ("locks", "README.md") and f"`{path}`" not in text]


def test_links_in_the_documents_lead_somewhere():
    named = ("README.md", "jobs/README.md", "cluster/README.md", "CONTRIBUTING.md", "SECURITY.md")
    for document in (*(ROOT / name for name in named), *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_reason_why_a_row_is_no_conversation_is_in_the_remedies():
    remedies = (ROOT / "docs" / "remedies.md").read_text(encoding="utf-8").replace("`", "")
    source = (ROOT / "rdpo" / "synthesis" / "conversation.py").read_text(encoding="utf-8")
    reasons = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Unusable", "_place"):
            for one in ast.walk(node):
                if isinstance(one, ast.Constant) and isinstance(one.value, str):
                    reasons.append(one.value.replace("`", "").strip(" :,;"))
    reasons = [reason for reason in reasons if len(reason) > 9]
    assert len(reasons) > 12
    assert not [reason for reason in reasons if reason not in remedies]
