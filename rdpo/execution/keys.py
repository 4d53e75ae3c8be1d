"""Keys: a stage's key is a hash of its settings and of its inputs' content.

Settings that only say where and in what portions work is done do not count. They are marked on their fields in
`rdpo/config`, as `Annotated[int, PLACEMENT]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, get_args

from rdpo.config import PLACEMENT, Job, Section
from rdpo.records import digest

FORMAT = 1
START = "start"
"""Name under which the evaluation's settings hold those of the start model's answers, again with an engine."""


def stage_key(name: str, settings: dict[str, Any], inputs: dict[str, str]) -> str:
    """Hash of everything a stage's output depends on."""
    return digest(FORMAT, name, without_placement(settings), inputs)


def without_placement(settings: Any) -> Any:
    """A stage's settings, or a part of them, without those that only say where and in what portions work is done.

    Settings of finished stages come from their manifests, as plain tables. So a setting is known by its name: that of a
    marked field. It is looked for only where a section can stand; in all other tables the names are the user's (words
    of a template, an engine's options), and nothing is left out.
    """
    if isinstance(settings, list):
        return [without_placement(value) for value in settings]
    if not isinstance(settings, dict):
        return settings

    marked, nested = _placement_names()
    kept = {name: value for name, value in settings.items() if name not in marked}
    return {name: without_placement(value) if name in nested else value for name, value in kept.items()}


@lru_cache(maxsize=1)
def _placement_names() -> tuple[frozenset[str], frozenset[str]]:
    """Names of the marked fields, and of the fields whose sections have such fields."""
    marked: set[str] = set()
    nested = {START}
    for section in sections(Job):
        for name, field in section.model_fields.items():
            if PLACEMENT in field.metadata:
                marked.add(name)
            if any(_has_placement(inner) for inner in sections_in(field.annotation)):
                nested.add(name)
    return frozenset(marked), frozenset(nested)


def _has_placement(section: type[Section]) -> bool:
    return any(PLACEMENT in field.metadata for inner in sections(section) for field in inner.model_fields.values())


def sections(section: type[Section]) -> Iterator[type[Section]]:
    """A section and all that it holds."""
    yield section
    for field in section.model_fields.values():
        for inner in sections_in(field.annotation):
            yield from sections(inner)


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a field's type speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]
