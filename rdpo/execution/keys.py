"""Keys: a stage's key is a hash of the settings that change what it makes, and of what it reads of its inputs.

Fields that only say where and in what portions work is done, or trade memory for speed, are marked in `rdpo/config` and
do not count; nor does the address of a model or file where a fingerprint of it stands beside. Folders that an earlier
version has made hold keys of another form (`former_key`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import lru_cache
from itertools import chain
from typing import Any, get_args

from rdpo.cluster.hardware import COMPUTED
from rdpo.config import MEMORY, MEMORY_OPTIONS, PLACEMENT, Job, Section
from rdpo.files.manifest import Settings
from rdpo.records import Fingerprint, digest

FORMAT, FORMER_FORMAT = 2, 1
START, STUDENT, SOURCES = "start", "student", "sources"
"""Names under which settings hold those of the start model's answers, again with an engine, of the student, and of
several sources."""
ADDRESSES = {
    "weights": ("model", "revision", "teacher"),
    "adapter_weights": ("adapter",),
    "tokenizer": ("student", "revision"),
    "content": ("source",),
    "turns": ("task",),
    "row_weights_content": ("row_weights",),
    COMPUTED: ("dtype",),
}
"""Settings that say by content what others in the same table say by name."""
ADDED = frozenset({COMPUTED, "tokenizer", "imports", "engine_code", "judge_seed"})
"""Settings that earlier versions did not write down."""


def stage_key(name: str, settings: Settings, inputs: dict[str, str]) -> str:
    """Hash of everything a stage's output depends on."""
    return digest(FORMAT, name, what_counts(settings), inputs)


def former_key(name: str, settings: Settings, inputs: dict[str, str]) -> str:
    """The key that earlier versions gave to a stage of the same settings."""
    return digest(FORMER_FORMAT, name, _as_formerly(settings), inputs)


def same_settings(one: object, other: object) -> bool:
    """Whether two stages' settings, or parts of them, make the same of the same."""
    return digest(what_counts(one)) == digest(what_counts(other))


def what_counts(settings: Any) -> Any:
    """A stage's settings, or a part of them, without those that change nothing of what it makes.

    Settings of finished stages come from their manifests, as plain tables. So a setting is known by its name: that of a
    marked field. It is looked for only where a section can stand; in all other tables the names are the user's (words
    of a template, for example), and nothing is left out but those of vLLM's arguments that are like marked fields.
    """
    if isinstance(settings, list):
        return [what_counts(value) for value in settings]
    if not isinstance(settings, dict):
        return settings

    left_out = set(_everywhere()) | _of_kind(settings.get("kind"))
    for content, addresses in ADDRESSES.items():
        if settings.get(content) is not None:
            left_out.update(addresses)

    counted = {name: value for name, value in settings.items() if name not in left_out}
    for name in _nested() & counted.keys():
        counted[name] = what_counts(counted[name])
    if isinstance(options := counted.get("options"), dict):
        counted["options"] = {name: value for name, value in options.items() if name not in MEMORY_OPTIONS}
    return counted


def _as_formerly(settings: Any) -> Any:
    """A stage's settings as they counted for earlier versions."""
    if isinstance(settings, list):
        return [_as_formerly(value) for value in settings]
    if isinstance(settings, Fingerprint):
        return settings.former()
    if not isinstance(settings, dict):
        return settings

    placement, nested = _marked_anywhere(PLACEMENT), _nested()
    counted = {name: value for name, value in settings.items() if name not in placement | ADDED}
    # In other tables the names are the user's.
    return {
        name: _as_formerly(value) if name in nested or isinstance(value, Fingerprint) else value
        for name, value in counted.items()
    }


@lru_cache(maxsize=1)
def _everywhere() -> frozenset[str]:
    """Names of fields that count in no section."""
    marked: set[str] = set()
    unmarked: set[str] = set()
    for section in sections(Job):
        for name in section.model_fields:
            (marked if _is_marked(section, name) else unmarked).add(name)
    return frozenset(marked - unmarked)


@lru_cache(maxsize=8)
def _of_kind(kind: object) -> frozenset[str]:
    """Names of the fields that do not count for one kind of reward, whatever they mean elsewhere."""
    for section in sections(Job):
        own = section.model_fields.get("kind")
        if own is not None and kind in get_args(own.annotation):
            return frozenset(name for name in section.model_fields if _is_marked(section, name))
    return frozenset()


@lru_cache(maxsize=8)
def _marked_anywhere(*marks: str) -> frozenset[str]:
    found: set[str] = set()
    for section in sections(Job):
        found.update(name for name in section.model_fields if _is_marked(section, name, marks))
    return frozenset(found)


@lru_cache(maxsize=1)
def _nested() -> frozenset[str]:
    """Names of the fields whose sections have marked fields, and of tables of the settings that are like them."""
    names = {START, STUDENT, SOURCES}
    for section in sections(Job):
        for name, field in section.model_fields.items():
            if any(map(_has_marked, sections_in(field.annotation))):
                names.add(name)
    return frozenset(names)


def _has_marked(section: type[Section]) -> bool:
    """Whether a section, or one in it, has a marked field."""
    fields = ((one, name) for one in sections(section) for name in one.model_fields)
    return any(_is_marked(one, name) for one, name in fields)


def _is_marked(section: type[Section], name: str, marks: Collection[str] = (PLACEMENT, MEMORY)) -> bool:
    return any(mark in section.model_fields[name].metadata for mark in marks)


def sections(section: type[Section]) -> Iterator[type[Section]]:
    """A section and all that it holds."""
    yield section
    for field in section.model_fields.values():
        for inner in sections_in(field.annotation):
            yield from sections(inner)


def sections_in(annotation: object) -> list[type[Section]]:
    """The sections that a field's type speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return list(chain.from_iterable(map(sections_in, get_args(annotation))))
