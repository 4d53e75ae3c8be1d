"""What is counted and noted of a stage folder: its manifest once it is committed, and what a written block held."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]
"""What a stage's output depends on, by name, in values that JSON has."""
Summary = dict[str, Any]
"""What a stage tells of its output, by name, in values that JSON has."""


@dataclass
class Manifest:
    """What a committed stage folder holds and what it was made from.

    `files` and `digest` are of the files' content. `columns` has a hash of each column of the kept rows, whatever parts
    they lie in, and none in a stage without rows; it is None in manifests of earlier versions, whose `digest` was of
    the key too. `job` is the whole job that made the stage, as TOML; empty in manifests of earlier versions.
    """

    stage: str
    key: str
    settings: Settings
    inputs: dict[str, str]
    rows_in: int = 0
    rows_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    together: list[str] = field(default_factory=list)
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] | None = None
    summary: Summary = field(default_factory=dict)
    digest: str = ""
    created: str = ""
    job: str = ""


@dataclass(frozen=True)
class WriteProgress:
    """Counts of one written block."""

    rows: int
    dropped: int
    tokens: int
