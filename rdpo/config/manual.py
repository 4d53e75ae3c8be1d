"""docs/config.md: every field of a job file with its type, default and meaning, out of the models themselves.

python -m rdpo.config.manual > docs/config.md
"""

from __future__ import annotations

import datetime
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rdpo.config.job import Job
from rdpo.config.rewards import Reward, RewardSection
from rdpo.config.section import Section
from rdpo.config.task import Task, Turn
from rdpo.config.training import LOSS_OPTIONS, REWARD_USES, Loss

INTRODUCTION = """\
# The job file

Every field of a job, section by section, in the order in which data passes them. `make docs` writes this page from
[rdpo/config](../rdpo/config), where each field is defined and checked.

A job is one TOML file. A key of a section stands in its table, `[training]` and below it `beta = 0.2`, or is written
out, `training.beta = 0.2`; on the command line it is `--set training.beta=0.2`. A key that is not here is refused. Only
`name`, `student.model` and `prompts.source` (or `prompts.sources`, or `prompts.made`) are always required. What has no
default may be left out.

A file whose name ends in `.yaml` or `.yml` is read as YAML, with the same keys, checks and messages; so are comparisons
and tasks. It is read by the rules of YAML 1.2 (`3e-4` is a number, `no` a word), and a key that stands twice, a key
without a value, and an alias are refused.

`rdpo run JOB.toml --dry-run` prints a job with all its defaults.
"""
OPTIONAL = " Without this table there is no such stage."
NO_STAGES = {"annotators"}
"""Optional tables that say how often stages are made, and are none themselves."""
SHARED = "Tables in several places"
WORDS = {
    str: ("text", "texts"),
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    datetime.date: ("date", "dates"),
    bool: ("`true` or `false`", "`true` or `false`"),
}
BOUNDS = {
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "min_length": "at least {} of them",
}

Shared = dict[type[Section], list[str]]
"""The tables that stand in several places of a job, each with these."""


def manual() -> str:
    """The page, as Markdown."""
    shared = _shared()
    plain = {name: field for name, field in Job.model_fields.items() if not _in(field.annotation)}
    parts = [INTRODUCTION, *_table(plain, shared)]
    for name in _sections(Job):
        parts += _rewards(shared) if name == "rewards" else _section(name, Job, shared)
    parts.append(f"## {SHARED}\n")
    for model, places in shared.items():
        where = ", ".join(f"`{place}`" for place in dict.fromkeys(places))
        parts += [f"### {model.__name__}\n", f"{_one_line(model.__doc__)} In {where}.\n"]
        parts += _table(model.model_fields, shared)
    return "\n".join([*parts, *_task()])


def _section(path: str, owner: type[Section], shared: Shared, depth: int = 2) -> Iterator[str]:
    field = owner.model_fields[path.rsplit(".", 1)[-1]]
    model, kind = _in(field.annotation)[0], get_origin(field.annotation)
    # A table of tables: the user names them.
    table = f"[[{path}]]" if kind is list else f"[{path}.NAME]" if kind is dict else f"[{path}]"
    yield f"{'#' * depth} {table}\n"
    optional = owner is Job and field.default is None and path not in NO_STAGES
    yield f"{_one_line(model.__doc__)}{OPTIONAL if optional else ''}\n"
    yield from _table(model.model_fields, shared)
    if issubclass(model, Loss):
        yield from _losses()
    for name in _sections(model):
        if _models(model, name)[0] not in shared:
            yield from _section(f"{path}.{name}", model, shared, depth + 1)


def _task() -> Iterator[str]:
    """The other file that a job may need."""
    yield f"## The task file\n\n{_one_line(Task.__doc__)} [own.md](own.md) writes one.\n"
    yield from _table({name: field for name, field in Task.model_fields.items() if name != "turns"}, {})
    yield f"### [[turns]]\n\n{_one_line(Turn.__doc__)}\n"
    yield from _table(Turn.model_fields, {})


def _losses() -> Iterator[str]:
    """Which options each loss takes."""
    yield "An option that a loss does not take is refused:\n"
    yield "| `loss` | options besides `beta` and `sft_coef` | `reward_as` |\n|---|---|---|"
    for name, takes in LOSS_OPTIONS.items():
        yield f"| `{name}` | {_quoted(takes - REWARD_USES)} | {_quoted(takes & REWARD_USES)} |"
    yield ""


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _rewards(shared: Shared) -> Iterator[str]:
    yield "## [[rewards]]\n"
    yield f"{Job.model_fields['rewards'].description} Each has a `kind`, and besides the fields of its kind these:\n"
    yield from _table(RewardSection.model_fields, shared)
    for model in _in(Reward):
        kind = get_args(model.model_fields["kind"].annotation)[0]
        common = {"kind", *RewardSection.model_fields}
        own = {name: field for name, field in model.model_fields.items() if name not in common}
        yield f'### kind = "{kind}"\n'
        yield f"{_one_line(model.__doc__)}\n"
        yield from _table(own, shared)
        for name in _sections(model):
            inner = _models(model, name)[0]
            # A reward within another is one of those on this page.
            if inner not in shared and not issubclass(inner, RewardSection):
                yield from _section(f"rewards.{name}", model, shared, depth=4)


def _table(fields: dict[str, FieldInfo], shared: Shared) -> Iterator[str]:
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for name, field in fields.items():
        inner = next((model for model in _in(field.annotation) if model in shared), None)
        kind = f"table, see [{inner.__name__}](#{inner.__name__.lower()})" if inner else _type(field)
        cells = (f"`{name}`", kind, _default(field), _one_line(field.description))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _sections(model: type[Section]) -> list[str]:
    """The fields that are tables themselves."""
    return [name for name, field in model.model_fields.items() if _in(field.annotation)]


def _shared() -> Shared:
    """Every table that two sections of a job have."""
    places: Shared = {}
    for section in _sections(Job):
        for model in _models(Job, section):
            for name in _sections(model):
                for inner in _models(model, name):
                    places.setdefault(inner, []).append(f"{section}.{name}")
    return {model: where for model, where in places.items() if len(where) > 1}


def _models(model: type[Section], field: str) -> list[type[Section]]:
    """The tables that a field may hold."""
    return _in(model.model_fields[field].annotation)


def _in(annotation: object) -> list[type[Section]]:
    """The tables that an annotation speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return list(chain.from_iterable(map(_in, get_args(annotation))))


def _type(field: FieldInfo) -> str:
    bounds = []
    for limit in [*field.metadata, *_limits(field.annotation)]:
        bounds += [words.format(getattr(limit, name)) for name, words in BOUNDS.items() if hasattr(limit, name)]
    return ", ".join([_words(field.annotation), *dict.fromkeys(bounds)])


def _limits(annotation: object) -> list[object]:
    """The limits within an annotation: of a list's items, of one of several types."""
    if get_origin(annotation) is Literal:
        return []
    fields = [part for part in getattr(annotation, "__metadata__", ()) if isinstance(part, FieldInfo)]
    own = chain.from_iterable(field.metadata for field in fields)
    return [*own, *chain.from_iterable(map(_limits, get_args(annotation)))]


def _words(annotation: Any, several: bool = False) -> str:
    """A type in words."""
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if part is not NoneType]
    if origin is Annotated:
        return _words(parts[0], several)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(part)}`" for part in parts)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(part, several) for part in parts))
    if origin is tuple:
        return f"list of {len(parts)} {_words(parts[0], several=True)}"
    if origin is list:
        return f"list of {_words(parts[0], several=True)}"
    return WORDS.get(annotation, ("table", "tables"))[several]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, Section):
        return ""
    return f"`{json.dumps(value, default=str)}`"


def _one_line(text: str | None) -> str:
    return re.sub(r"\s+", " ", inspect.cleandoc(text or "")).strip()


if __name__ == "__main__":
    print(manual(), end="")
