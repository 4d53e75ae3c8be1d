"""Metrics on disk: valid JSON whatever the numbers, also after they were read back."""

import json
import math

from rdpo.files.stage_folder import StageFolder
from rdpo.training.trainer import METRICS, _History


def test_numbers_that_json_does_not_know_survive_a_restart(tmp_path):
    folder = StageFolder(str(tmp_path), "training")
    folder.begin("k")
    history = _History(folder, lambda metrics: None, lambda warning: None)
    history.steps[1] = {"step": 1, "loss": math.nan, "grad_norm": math.inf}
    history.write()
    again = _History(folder, lambda metrics: None, lambda warning: None)
    again.steps[2] = {"step": 2, "loss": 0.5, "grad_norm": 1.0}
    again.write()
    lines = [json.loads(line) for line in folder.read_bytes(METRICS).decode().splitlines()]
    assert lines[0] == {"step": 1, "loss": None, "grad_norm": None}
    assert lines[1]["loss"] == 0.5
