"""The wheel: whoever installs it has every file of the package, also those that are not Python."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "rdpo", source / "rdpo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if name.startswith("rdpo/")}
    assert held == {str(path.relative_to(ROOT)) for path in _files(ROOT / "rdpo")}
    needed = {"py.typed", "report/templates/style.css", "synthesis/tasks/roleplay.toml"}
    assert {f"rdpo/{name}" for name in needed} <= held


def _files(folder):
    return [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
