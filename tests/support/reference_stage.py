"""Pairs of random text, a run whose reference stage has them, and the losses of training on it."""

import pyarrow as pa

from rdpo.config import Job
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder


def pair(draw, index):
    def message():
        return [{"role": "assistant", "content": "".join(draw.choices("abcdefgh ", k=draw.randint(4, 24))) + "!"}]

    return {
        "prompt_id": f"p{index:02d}",
        "prompt": [{"role": "user", "content": f"question {index}"}],
        "chosen": message(),
        "rejected": message(),
        "chosen_finished": True,
        "rejected_finished": index % 3 > 0,
        "reward_gap": draw.uniform(-1, 2),
        "heldout": index >= 24,
    }


def referenced(place, table, pairs):
    """Make a run whose reference stage is done with these pairs; its directory."""
    from rdpo.preference.reference import Reference

    rows = Reference(Job.model_validate(table))(pa.Table.from_pylist(pairs))
    folder = StageFolder(str(place), "reference")
    folder.begin("k")
    folder.write_parts(rows, "prompt_id")
    folder.commit(Manifest("reference", "k", {}, {}), "prompt_id", len(pairs))
    return str(place)


def losses(history):
    return [step["loss"] for step in history]
