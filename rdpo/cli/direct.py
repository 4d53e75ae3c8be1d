"""Jobs without a file: `rdpo dpo` and `rdpo synth` make one out of their options, print it and run it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

import tomli_w

from rdpo.cli.init import job_text
from rdpo.config import Job, job_of, with_changes
from rdpo.config.files import apply_overrides


def direct_job(
    name: str, given: Mapping[str, str | None], changes: Mapping[str, Any], overrides: list[str]
) -> tuple[str, Job]:
    """A job as TOML and as it is, out of answers to the questions of `rdpo init` and their defaults.

    Args:
        name: the job's; its run lives in `runs/NAME`.
        given: answers by the names of their questions; those that are missing have their defaults.
        changes: settings by their names, over these.
        overrides: further ones, as `--set` has them.

    Raises:
        InputError: an answer or a setting is missing or wrong.
    """
    table = with_changes(tomllib.loads(job_text(name, given, yes=True)), changes)
    apply_overrides(table, overrides)
    return tomli_w.dumps(table), job_of(table, f"rdpo {name}")
