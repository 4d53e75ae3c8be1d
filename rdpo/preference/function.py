"""A Python function as reward."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable

import pyarrow as pa

from rdpo.config import FunctionReward
from rdpo.errors import InputError
from rdpo.preference.scores import record_scores
from rdpo.records import drop, table_of


def load_function(name: str, path: str | None = None) -> Callable[..., float]:
    """The function `package.module:name`, imported from the working directory or the environment.

    Raises:
        InputError: it cannot be imported or is not callable.
    """
    path = path or os.getcwd()
    if path not in sys.path:
        sys.path.insert(0, path)
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"reward function {name}: {error} (looked in {path} too)") from None
    if not callable(function):
        raise InputError(f"reward function {name} is not callable")
    return function


def score_by_function(batch: pa.Table, reward: FunctionReward, answers: list[str], path: str) -> pa.Table:
    """Score a block of rows with a Python function; a row on which it fails is dropped."""
    function = load_function(reward.function, path)
    rows = batch.to_pylist()
    for answer in answers:
        for position, row in enumerate(rows):
            try:
                score = float(function(row["prompt"], row[answer], row))
            except Exception as error:
                rows[position] = row = drop(row, f"reward {reward.name}: {type(error).__name__}: {error}"[:300])
                score = math.nan
            rows[position] = record_scores([row], answer, reward.name, [score])[0]
    return table_of(rows)
