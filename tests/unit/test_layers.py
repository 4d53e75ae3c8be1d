"""How the package is built: imports run downwards only, in no circle, and no file grows out of hand."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "rdpo"
ORDER = (
    *("cli", "api", "experiments", "report", "inspection", "planning", "stages", "execution", "evaluation"),
    *("preference", "synthesis", "training", "modeling", "cluster", "tracking", "config", "files"),
    *("messages", "records", "errors", "rewards"),
)
ROOMS = {"evaluation", "training", "preference", "synthesis", "modeling"}
ROOT = {"__init__.py", "__main__.py", "api.py", "errors.py", "messages.py", "records.py", "rewards.py"}
LONGEST = 400


def name_of(path):
    parts = ("rdpo", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def statements(node):
    """All statements below a node, those of functions included, but for what only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (inner for other in child.orelse for inner in (other, *statements(other)))
        else:
            yield child
            yield from statements(child)


def imported(path):
    """Names of the modules that a file imports."""
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        if isinstance(node, ast.ImportFrom):
            whole = (f"{node.module}.{one.name}" for one in node.names)
            yield from (name if name in MODULES else node.module for name in whole)


IMPORTS = {name: {other for other in imported(path) if other in MODULES} for name, path in MODULES.items()}


def layer(module):
    """The place of a module in the order; the root's version number lies below everything."""
    parts = module.split(".")
    if module in ("rdpo", "rdpo.__main__"):
        return -1 if module == "rdpo.__main__" else len(ORDER)
    return ORDER.index(parts[1])


def test_imports_run_downwards():
    upwards = [(name, other) for name, others in IMPORTS.items() for other in others if layer(other) < layer(name)]
    assert upwards == []


def test_the_machine_under_the_stages_knows_no_room():
    known = {other.split(".")[1] for name in MODULES if name.startswith("rdpo.execution") for other in IMPORTS[name]}
    assert known
    assert not known & ROOMS


def test_there_is_no_circle():
    done = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in IMPORTS[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_the_root_holds_what_a_program_calls_and_what_all_share():
    assert {path.name for path in PACKAGE.glob("*.py")} == ROOT
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ORDER) - {
        "api",
        "messages",
        "records",
        "errors",
        "rewards",
    }


def test_no_file_is_long():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: count for name, count in lines.items() if count > LONGEST}


def test_one_module_imports_deepspeed():
    users = {name for name, path in MODULES.items() if any(one.split(".")[0] == "deepspeed" for one in imported(path))}
    assert users == {"rdpo.training.deepspeed"}


def test_the_training_loop_is_imported_without_deepspeed():
    code = "import sys, rdpo.training.worker, rdpo.planning.plan; print('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_table_of_stages_is_light():
    heavy = ("pyarrow", "numpy", "pydantic", "torch", "ray", "transformers")
    code = f"import sys, rdpo.stages.table; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_test_imports_helpers_from_the_support_folder_alone():
    tests = Path(__file__).parents[1]
    files = [path for path in sorted(tests.rglob("*.py")) if path.parent.name != "support"]
    own = {path: {name for name in imported(path) if name.split(".")[0] == "tests"} for path in files}
    assert any(own.values())
    foreign = {name for names in own.values() for name in names if name.split(".")[:2] != ["tests", "support"]}
    assert foreign == set()
