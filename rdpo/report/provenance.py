"""Which models and files a run has read, by the fingerprints that the manifests of its stages hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rdpo.files.manifest import Manifest


@dataclass
class ReadSource:
    """A model, file or function with its fingerprint, and the stages that read it."""

    name: str
    fingerprint: str
    stages: list[str] = field(default_factory=list)


def sources(manifests: Mapping[str, Manifest], student: str) -> list[ReadSource]:
    """All sources in the order of the stages; one that has changed between two stages is listed twice."""
    found: dict[tuple[str, str], ReadSource] = {}
    for stage, manifest in manifests.items():
        for name, fingerprint in _named(manifest.settings, student):
            source = found.setdefault((name, fingerprint), ReadSource(name, fingerprint))
            if stage not in source.stages:
                source.stages.append(stage)
    return list(found.values())


def _named(settings: Any, student: str) -> Iterator[tuple[str, str]]:
    """Names with fingerprints, wherever a stage puts them into a stage's settings."""
    if isinstance(settings, list):
        for value in settings:
            yield from _named(value, student)
    if not isinstance(settings, dict):
        return

    if settings.get("weights"):
        # A teacher or a judge that the job does not name is the student itself.
        yield settings.get("teacher") or settings.get("model") or student, settings["weights"]
    if settings.get("kind") == "implicit":
        yield f"what {settings['name']} is measured against", settings["reference"]
    if settings.get("adapter_weights"):
        yield settings["adapter"], settings["adapter_weights"]
    if settings.get("content"):
        yield settings.get("source") or "known pairs", settings["content"]
    if settings.get("function"):
        yield settings["function"], settings["source"]

    # Models also stand in tables within tables, a reward in a list of them.
    for value in settings.values():
        yield from _named(value, student)
