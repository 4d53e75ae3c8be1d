"""What jobs and tests take from the package is there, also where they take it only as they run."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("jobs", "tests", "cluster") for path in (ROOT / folder).rglob("*.py"))


def taken(path):
    """Modules of the package that a file names, each with what it takes of it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rdpo":
            yield node.module, [one.name for one in node.names]


@pytest.mark.parametrize("folder", ["jobs", "tests", "cluster"])
def test_every_name_is_there(folder):
    missing = []
    for path in (path for path in FILES if path.is_relative_to(ROOT / folder)):
        for module, names in taken(path):
            found = import_module(module)
            for name in names:
                # A module within a package need not have been imported yet.
                if not hasattr(found, name) and not (Path(found.__file__).parent / f"{name}.py").exists():
                    missing.append(f"{path.relative_to(ROOT)}: {module}.{name}")
    assert not missing
