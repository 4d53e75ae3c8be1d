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
        why = stage.doubt(run.job, folder) or "its inputs were made again"
        why = f"other {', '.join(other)}" if other else why
        run.console.say(f"{stage.name:<12}half made, and begun anew: {why}")
        # By its key alone work that is in doubt would stay.
        folder.clear()
    folder.begin(
        stage_key(stage.name, settings, _attempts(run, stage)),
        {"settings": settings, "versions": versions(), "job": to_toml(run.job)},
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
    begun = folder.begun
    if not begun or folder.manifest() is not None:
        return False
    # Earlier versions noted no settings. Their key takes a whole model to make, so it is not asked for without need.
    key_of = stage_key if "settings" in begun else former_key
    same = begun.get("key") == key_of(stage.name, settings, _attempts(run, stage))
    return same and not stage.doubt(run.job, folder)


def _attempts(run: Run, stage: Stage) -> dict[str, str]:
    return {name: run.folder(name).attempt_id for name in stage.inputs}


def _other(then: Any, now: Settings) -> list[str]:
    """Names of the settings that were other ones; none where an earlier version did not note them."""
    if not isinstance(then, dict):
        return []
    then, now = what_counts(then), what_counts(now)
    return sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
