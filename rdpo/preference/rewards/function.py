"""A Python function as reward."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rdpo.config import FunctionReward, Job
from rdpo.errors import InputError, did_you_mean
from rdpo.files.manifest import Settings
from rdpo.preference.rewards.imports import helper_hash
from rdpo.preference.rewards.kind import RewardKind
from rdpo.preference.scores import record_scores
from rdpo.records import digest, drop, table_of
from rdpo.synthesis.columns import Needed

if TYPE_CHECKING:
    import ray.data

BLOCK_ROWS = 512


class FunctionKind(RewardKind[FunctionReward]):
    """A function runs in tasks, without a pool of its own."""

    def check_named(self, job: Job) -> None:
        """Import the function, and let it look for what it needs, if it has a `check` of its own.

        Raises:
            InputError: it cannot be used.
        """
        check = getattr(load_function(self.reward.function), "check", None)
        try:
            if callable(check):
                check()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise InputError(f"{self.where}: reward function {self.reward.function}: {said}") from None

    def check(self, job: Job) -> None:
        """Nothing beyond its import."""

    def settings(self, job: Job) -> Settings:
        """Its fields, the source of its module, and that of the user's other modules which that imports."""
        # First, for it finds modules in the working directory too.
        source = source_hash(self.reward.function)
        found = {**self.reward.model_dump(), "source": source}
        helpers = helper_hash(self.reward.function.partition(":")[0])
        return {**found, "imports": helpers} if helpers else found

    def score(self, rows: ray.data.Dataset, job: Job, answers: list[str]) -> ray.data.Dataset:
        """Score by the function."""
        arguments = {"reward": self.reward, "answers": answers, "path": os.getcwd()}
        blocks = rows.repartition(target_num_rows_per_block=BLOCK_ROWS)
        return blocks.map_batches(score_by_function, fn_kwargs=arguments, batch_format="pyarrow", **without_gpus())

    def columns(self) -> list[Needed]:
        """Those that the function itself names."""
        names = getattr(load_function(self.reward.function), "columns", ())
        return [Needed((name,), f"{self.where}.function", f"{self.reward.function} reads it") for name in names]

    def needs_trial(self, job: Job) -> bool:
        """It loads no model, and may need columns that only the teacher writes."""
        return False


def without_gpus() -> dict[str, Any]:
    """How Ray is asked for workers to which no GPU is visible.

    Those of a task that asks for none see all of them, and a function that uses torch would take one that an engine or
    the training has.
    """
    import ray

    # A worker of its own takes seconds to start.
    if not (ray.is_initialized() and ray.cluster_resources().get("GPU")):
        return {}
    return {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}


def load_function(name: str, path: str | None = None) -> Callable[..., float]:
    """The function `package.module:name`, imported from the working directory or the environment.

    Raises:
        InputError: it cannot be imported, is not callable or not written in Python.
    """
    path = path or os.getcwd()
    # Ray starts workers in a directory of its own; the module lies in the driver's.
    if path not in sys.path:
        sys.path.insert(0, path)

    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        meant = did_you_mean(attribute, vars(sys.modules[module])) if module in sys.modules else ""
        said = f"{type(error).__name__}: {error}{meant}"
        raise InputError(f"reward function {name}: {said} (looked in {path} too)") from None

    if not callable(function):
        raise InputError(f"reward function {name} is not callable")
    # Its source is a part of the stage's key; of a built-in function there is none to compare.
    if not _written_in_python(function):
        raise InputError(f"reward function {name} is built in; write a function of your own that calls it")

    found: Callable[..., float] = function
    return found


def source_hash(name: str) -> str:
    """Hash of the source of the module that a function is named by, and of the one that defines it."""
    modules = {inspect.getmodule(load_function(name)), sys.modules[name.partition(":")[0]]}
    return digest(sorted(inspect.getsource(module) for module in modules if module and inspect.getsourcefile(module)))


def _written_in_python(function: Callable[..., object]) -> bool:
    """Whether its module's source can be read, as the key of the rewards stage needs."""
    module = inspect.getmodule(function)
    return module is not None and getattr(module, "__file__", None) is not None and bool(inspect.getsourcefile(module))


def score_by_function(batch: pa.Table, reward: FunctionReward, answers: list[str], path: str) -> pa.Table:
    """Score a block of rows with a Python function; a row on which it fails is dropped."""
    function = load_function(reward.function, path)
    rows = batch.to_pylist()
    for answer in answers:
        for position, row in enumerate(rows):
            try:
                score = float(function(row["prompt"], row[answer], row))
            except Exception as error:
                # A function of the user's may raise anything, and one bad row must not end the stage.
                rows[position] = row = drop(row, f"reward {reward.name}: {type(error).__name__}: {error}"[:300])
                score = math.nan
            rows[position] = record_scores([row], answer, reward.name, [score])[0]
    return table_of(rows)
