"""Job files: TOML or YAML in, a validated `Job` or one message that names file and field out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rdpo.config.job import Job
from rdpo.config.section import Section, Table, may_hold_secret
from rdpo.errors import InputError, did_you_mean
from rdpo.records import clean

MARKS = {"job": "student", "task": "turns", "comparison": "baseline"}
"""By which key a file of each kind is known: one that it must have, and no other kind has."""
TAKEN_BY = {
    "job": "`rdpo run` takes it",
    "task": "a job names it as synthesis.task",
    "comparison": "`rdpo compare` takes it",
}
YAML = (".yaml", ".yml")
OPTION_IN_ADDRESS = re.compile(r'"(?:s3|gs|gcs)://(?:[^/"]*@|[^"]*\?)')

QUOTED = re.compile(r"'([^']*)'")


def load_job(path: str | Path, overrides: list[str] | None = None) -> Job:
    """Read a job file, apply `section.key=value` overrides, validate.

    Raises:
        InputError: the file is missing, neither TOML nor YAML, or a key or value is wrong; names file and field.
    """
    table = read_tables(path)
    apply_overrides(table, overrides or [])
    return job_of(table, str(path))


def apply_overrides(table: Table, overrides: Iterable[str]) -> None:
    """Put `section.key=value` overrides into a job's tables.

    Raises:
        InputError: one of them is wrong.
    """
    for override in overrides:
        _apply_override(table, override)


def with_changes(table: Mapping[str, object], changes: Mapping[str, object]) -> Table:
    """A copy of a job's tables with some settings changed, by their names, as in `{"training.beta": 0.2}`.

    Raises:
        InputError: a name leads through a value, or to no entry of a list.
    """
    changed = deepcopy(dict(table))
    for name, value in changes.items():
        _put(changed, name, value, name)
    return changed


def job_of(table: Table, where: str) -> Job:
    """The job that a table describes.

    Raises:
        InputError: a key or value is wrong; names `where` the table is from, and the field.
    """
    check_kind(table, "job", where)
    try:
        job = Job.model_validate(table)
    except ValidationError as error:
        raise InputError(explained(where, error)) from None
    # The job is written down and shown in the report.
    if OPTION_IN_ADDRESS.search(job.model_dump_json()):
        raise InputError(
            f"{where}: an address of an object store holds a key or an option; set AWS_… variables instead"
        )
    return job


def check_kind(table: Mapping[str, object], wanted: str, where: str | Path) -> None:
    """Whether a file is of the kind that is wanted here: a job, a task or a comparison.

    Raises:
        InputError: it is of another kind; says who takes it.
    """
    kinds = [kind for kind, mark in MARKS.items() if mark in table]
    if kinds and wanted not in kinds:
        raise InputError(f"{where}: is a {kinds[0]}, not a {wanted}; {TAKEN_BY[kinds[0]]}")


def read_tables(path: str | Path) -> Table:
    """The tables of a file: YAML where its name ends so, else TOML.

    Raises:
        InputError: it is missing, or not what its name says.
    """
    try:
        return tables_of(_content(path).decode(), path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such job file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid {_format(path)}: {error}") from None


def tables_of(text: str, path: str | Path) -> Table:
    """The tables that a file of this name holds.

    Raises:
        ValueError: it is not what its name says.
    """
    if _format(path) == "TOML":
        return tomllib.loads(text)
    from rdpo.config.yaml_file import read_yaml

    return read_yaml(text)


def _format(path: str | Path) -> str:
    return "YAML" if str(path).lower().endswith(YAML) else "TOML"


def _content(path: str | Path) -> bytes:
    if "://" not in str(path):
        return Path(path).read_bytes()
    from rdpo.files.stores import open_file

    with open_file(str(path)) as file:
        return bytes(file.read())


def to_toml(job: Job) -> str:
    """The resolved job as TOML; `load_job` reads it back."""
    import tomli_w

    return tomli_w.dumps(to_table(job))


def to_table(job: Job) -> Table:
    """The tables of a resolved job; `job_of` reads them back."""
    return job.model_dump(mode="json", exclude_none=True)


def _apply_override(table: Table, override: str) -> None:
    if clean(override) != override:
        raise InputError(f"--set {override}: not UTF-8; write it as section.key=value")
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {override}: write it as section.key=value")
    _put(table, key.strip(), _toml_value(text), f"--set {override}")


def _put(table: Table, name: str, value: object, change: str) -> None:
    """Set the value at `section.key`; `change` is what a message calls the change."""
    *sections, last = name.split(".")
    target: Any = table
    for section in sections:
        target = _descend(target, section, change)
    if isinstance(target, list):
        raise InputError(f"{change}: name an entry of the list, as in rewards.0.weight=1")
    target[last] = value


def _descend(target: Any, section: str, change: str) -> Any:
    if isinstance(target, list):
        # Not by `int`, which takes other scripts' digits and refuses numbers of thousands of them.
        entries = {str(index): entry for index, entry in enumerate(target)}
        if section not in entries:
            raise InputError(f"{change}: the list has entries 0 to {len(target) - 1}")
        return _section(entries[section], section, change)
    return _section(target.setdefault(section, {}), section, change)


def _section(child: Any, section: str, change: str) -> Any:
    if not isinstance(child, dict | list):
        raise InputError(f"{change}: {section} is a value, not a section")
    return child


def _toml_value(text: str) -> object:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # A line break in the text must not begin another key.
    return table["value"] if len(table) == 1 else text


def explained(where: str | Path, error: ValidationError) -> str:
    """What is wrong with a table, field by field."""
    lines = [f"{where}: {len(error.errors())} problem(s) in the job file"]
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        lines.append(f"  {field or 'job'}: {_remedy(problem, field)}")
    return "\n".join(lines)


def _remedy(problem: ErrorDetails, field: str) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"unknown key; remove it or correct its name{_suggestion(field)}"
    if problem["type"] == "missing":
        return "is required"
    if field.endswith("endpoint.url"):
        return "a URL like http://teacher:8000/v1, without a key in it"
    if field.endswith("endpoint.key_variable"):
        return "the name of an environment variable, like TEACHER_KEY; the key itself does not belong here"
    if problem["type"] in ("literal_error", "union_tag_invalid"):
        message += _meant(problem)
    value = repr(problem.get("input"))
    return f"{message} (got {value[:80]})" if len(value) < 200 and not _may_be_secret(field, problem) else message


def _may_be_secret(field: str, problem: ErrorDetails) -> bool:
    """Whether a value is better not repeated: that of an endpoint, a whole table, an address with a key."""
    value = problem.get("input")
    return "endpoint" in field.split(".") or isinstance(value, dict) or may_hold_secret(str(value))


def _suggestion(field: str) -> str:
    section, _, key = field.rpartition(".")
    return did_you_mean(key, _known_keys(section))


def _meant(problem: ErrorDetails) -> str:
    """What was meant by a word that is none of those a field takes."""
    if problem["loc"][-1] == "loss" and str(problem.get("input")).lower() == "rdpo":
        return '; refined DPO is loss = "dpo" with training.offset_coef, and a reward'
    context = problem.get("ctx", {})
    known = QUOTED.findall(str(context.get("expected") or context.get("expected_tags") or ""))
    return did_you_mean(str(context.get("tag") or problem.get("input")), known)


def _known_keys(section: str) -> list[str]:
    model: Any = Job
    for part in section.split(".") if section else []:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        options = getattr(field.annotation, "__args__", (field.annotation,))
        model = next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)
    return list(getattr(model, "model_fields", {}))
