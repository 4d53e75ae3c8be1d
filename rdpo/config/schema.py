"""JSON schemas of the files that people write, by which an editor completes and checks them.

A TOML file names its schema in a first line `#:schema job.schema.json`, which taplo and the editors that use it read.
What depends on several fields at once is checked when the file is loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rdpo.config.comparison import Comparison
from rdpo.config.job import Job
from rdpo.config.section import Section
from rdpo.config.task import Task

KINDS: dict[str, type[Section]] = {"job": Job, "comparison": Comparison, "task": Task}
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_of(kind: str) -> dict[str, Any]:
    """The schema of a job, a comparison or a task file."""
    return {"$schema": DIALECT, **KINDS[kind].model_json_schema()}


def schema_text(kind: str) -> str:
    """The same as text."""
    return json.dumps(schema_of(kind), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the schemas of all kinds into a folder."""
    for kind in KINDS:
        (Path(sys.argv[1]) / f"{kind}.schema.json").write_text(schema_text(kind), encoding="utf-8")


if __name__ == "__main__":
    main()
