"""What is half made: whether a stage goes on with it, or begins anew.

A folder that is begun notes the settings and the versions of packages with which that was done. Its key is that of a
finished stage, with the attempts at making the inputs in place of what they hold: an input may still be made.
"""

from __future__ import annotations

from typing import Any

from rdpo.cluster.installed import versions
from rdpo.config import to_toml
from rdpo.errors import InputError
from rdpo.execution.keys import former_key, stage_key, what_counts
from rdpo.execution.run import Run
from rdpo.execution.stage import Stage
from rdpo.files.manifest import Settings


def begin(run: Run, stage: Stage, settings: Settings) -> None:
    """Get a stage's folder ready: what is half made of the same settings and inputs stays; other work goes, as is said.

    Raises:
        InputError: see `check`.
    """
    folder = run.folder(stage.name)
    check(run, stage, settings)
    if _goes_on(run, stage, settings):
        folder.begin(folder.begun["key"])
        return

    if folder.manifest() is None and folder.holds_work():
        other = _other(folder.begun.get("settings"), settings)
        why = f"other {', '.join(other)}" if other else "its inputs were made again"
        run.console.say(f"{stage.name:<12}half made, and begun anew: {why}")
    folder.begin(
        _keys(run, stage, settings)[0], {"settings": settings, "versions": versions(), "job": to_toml(run.job)}
    )


def check(run: Run, stage: Stage, settings: Settings) -> None:
    """Look at what is half made of a stage.

    Raises:
        InputError: going on would mix what two versions of a package make.
    """
    folder = run.folder(stage.name)
    then, now = folder.begun.get("versions", {}), versions()
    other = [name for name in stage.packages if name in then and then[name] != now[name]]
    if not (other and folder.holds_work() and _goes_on(run, stage, settings)):
        return

    made, here = _in_words(other, then), _in_words(other, now)
    raise InputError(
        f"{folder.path}: half made with {made}, and here is {here}: one stage would hold what both make; install "
        f"{' '.join(f'{name}=={then[name]}' for name in other)} to go on, or remove that folder to begin the "
        f"{stage.name} stage anew"
    )


def _in_words(packages: list[str], at: dict[str, str]) -> str:
    return ", ".join(f"{name} {at[name]}" for name in packages)


def _goes_on(run: Run, stage: Stage, settings: Settings) -> bool:
    folder = run.folder(stage.name)
    return folder.manifest() is None and folder.begun.get("key") in _keys(run, stage, settings)


def _keys(run: Run, stage: Stage, settings: Settings) -> tuple[str, str]:
    """The key that the stage is begun with, and the one that earlier versions began it with."""
    attempts = {name: run.folder(name).attempt_id for name in stage.inputs}
    return stage_key(stage.name, settings, attempts), former_key(stage.name, settings, attempts)


def _other(then: Any, now: Settings) -> list[str]:
    """Names of the settings that were other ones; none where an earlier version did not note them."""
    if not isinstance(then, dict):
        return []
    then, now = what_counts(then), what_counts(now)
    return sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
