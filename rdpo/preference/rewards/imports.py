"""The user's own modules behind a reward function: what it imports is part of what it computes."""

from __future__ import annotations

import ast
import importlib
import site
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

from rdpo.records import digest


def helper_hash(module: str) -> str | None:
    """Hash of the user's own modules that a module imports, directly or through one another; None where there is none.

    Its own are those of the same top-level package, and all others outside the standard library and the installed
    packages. What is imported by a name that is put together at run time is not found, nor are files that are read.
    """
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        source = _own_source(name, module.partition(".")[0])
        if source is not None:
            found[name] = source
            waiting += _imports(name, source)
    found.pop(module, None)
    return digest(sorted(found.items())) if found else None


def _own_source(name: str, package: str) -> str | None:
    """The source of a module, if it is the user's own."""
    spec = _spec(name)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    path = Path(spec.origin).resolve()
    if name.partition(".")[0] != package and any(path.is_relative_to(root) for root in _installed()):
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _spec(name: str) -> ModuleSpec | None:
    """Where a module lies. No code is run for it: a function may import what is heavy only once it is called."""
    found, places, parts = None, None, name.split(".")
    for end in range(1, len(parts) + 1):
        inside = ".".join(parts[:end])
        found = next((spec for finder in sys.meta_path if (spec := finder.find_spec(inside, places))), None)
        if found is None or (end < len(parts) and found.submodule_search_locations is None):
            return None
        # A folder without __init__.py is looked for through the one around it, which must be known; it has no code.
        if end < len(parts) and not found.has_location:
            importlib.import_module(inside)
        places = found.submodule_search_locations
    return found


def _installed() -> list[Path]:
    """Where the standard library and installed packages are."""
    paths = sysconfig.get_paths()
    roots = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return [Path(root).resolve() for root in roots | {*site.getsitepackages(), site.getusersitepackages()}]


def _imports(name: str, source: str) -> Iterator[str]:
    """Names of all modules that a module's source may import, with the packages that they lie in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_packages(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = _base(name, node)
            yield from _with_packages(base)
            # What is taken from a package may be a module in it.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _base(name: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    spec = _spec(name)
    package = spec.name if spec and spec.submodule_search_locations else name.rpartition(".")[0]
    above = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def _with_packages(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))
