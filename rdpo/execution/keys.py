"""Keys: a stage's key is a hash of its settings and of its inputs' content.

Settings that only say where and in what portions work is done (`PLACEMENT`) do not count.
"""

from __future__ import annotations

from typing import Any

from rdpo.records import digest

FORMAT = 1
PLACEMENT = frozenset(
    {
        "concurrency",
        "gpus",
        "cpus",
        "kv_cache_gib",
        "batch_rows",
        "batches_in_flight",
        "gpus_per_worker",
        "cpus_per_worker",
        "checkpoint_every",
        "keep_checkpoints",
        "max_failures",
        "hang_after_s",
        "num_workers",
    }
)
# What else is nested has names of the user's: turns, template words, an engine's options.
SECTIONS = frozenset({"engine", "rewards", "start"})


def placeless(settings: Any) -> Any:
    """Settings without those that only say where and in what portions work is done."""
    if isinstance(settings, dict):
        kept = {key: value for key, value in settings.items() if key not in PLACEMENT}
        return {key: placeless(value) if key in SECTIONS else value for key, value in kept.items()}
    if isinstance(settings, list):
        return [placeless(value) for value in settings]
    return settings


def stage_key(name: str, settings: dict[str, Any], inputs: dict[str, str]) -> str:
    """Hash of everything a stage's output depends on."""
    return digest(FORMAT, name, placeless(settings), inputs)
