"""Linters that are installed beside Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def tool(name):
    """Path of a linter that is installed beside Python."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert found, f"{name} is not installed; `make install` does it"
    return found


def linted(name, *arguments):
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
