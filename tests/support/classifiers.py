"""Reward models with a classification head, as the tests' jobs name them."""

import json
from pathlib import Path

from rdpo.config import ClassifierReward

PROMPT = [{"role": "user", "content": "why?"}]
ANSWERS = ["because", "I do not know, and nobody else does either.", "x", "rain " * 9]


def classifier(folder, **changes):
    return ClassifierReward(kind="classifier", name="rm", model=folder, dtype="float32", **changes)


def edit_config(folder, **changes):
    """Change a saved configuration; None removes a key."""
    path = Path(folder) / "config.json"
    written = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in written.items() if value is not None}))
