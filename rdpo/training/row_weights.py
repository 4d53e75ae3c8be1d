"""Weights of rows: what the loss of each is multiplied with, from a file of JSON lines with `prompt_id` and `weight`.

The loss of a step is sum of w_i l_i / n over its n rows, not / sum of w_i: batches have a fixed size, so that its mean
over an epoch is the weighted objective itself, whichever rows come together. With weights of all ones it is the loss
without weights, to the last bit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping

from rdpo.errors import InputError
from rdpo.files.folder import Folder
from rdpo.files.stores import absolute
from rdpo.records import ID_COLUMN

WEIGHT = "weight"
"""The column of a table of pairs with the weight of each row."""
SETTING = "training.row_weights"

RowWeights = Mapping[str, float]
"""Weights by the ids of the rows."""


def read_weights(address: str) -> dict[str, float]:
    """The weights in a file.

    Raises:
        InputError: there is no such file, or a line is no id with a weight of 0 or more.
    """
    where, name = os.path.split(absolute(address))
    folder = Folder(where)
    if not folder.exists(name):
        raise InputError(f"{SETTING}: {address}: there is no such file")

    weights: dict[str, float] = {}
    for number, line in enumerate(folder.read_bytes(name).splitlines(), start=1):
        row_id, weight = _parsed(line, f"{SETTING}: {address}:{number}")
        weights[row_id] = weight
    return weights


def _parsed(line: bytes, place: str) -> tuple[str, float]:
    try:
        row = json.loads(line)
        row_id, weight = row[ID_COLUMN], row[WEIGHT]
    except (ValueError, KeyError, TypeError):
        raise InputError(f'{place}: write {{"{ID_COLUMN}": "…", "{WEIGHT}": 1.0}}') from None
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not isinstance(row_id, str) or not number or not 0 <= weight < math.inf:
        raise InputError(f"{place}: {ID_COLUMN} must be a text, and {WEIGHT} a finite number of 0 or more")
    return row_id, float(weight)


def write_weights(folder: Folder, name: str, weights: RowWeights) -> str:
    """Write weights as such a file, whole or not at all; its address."""
    lines = (json.dumps({ID_COLUMN: row_id, WEIGHT: weight}) + "\n" for row_id, weight in weights.items())
    folder.write_bytes(name, "".join(lines).encode())
    return folder.address(name)
