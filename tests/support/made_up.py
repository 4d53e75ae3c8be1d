"""A run directory as a finished run leaves it, with rows that are made up: nothing is run."""

import json

from rdpo.config import job_of, to_toml
from rdpo.evaluation.compare import summarize
from rdpo.execution.reader import JOB_FILE
from rdpo.files.folder import Folder
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder
from rdpo.records import prompt_id, question_id, table_of

HOSTILE = "<script>alert(1)</script>\u202e"


def message(role, content):
    return [{"role": role, "content": content}]


def pair(number):
    prompt = message("user", f"question {number}")
    return {
        "prompt_id": prompt_id(prompt),
        "question_id": question_id(prompt),
        "prompt": prompt,
        "chosen": message("assistant", f"Plain answer {number}."),
        "rejected": message("assistant", f"Arr, answer {number}! {HOSTILE}"),
        "chosen_from": "revision",
        "rejected_from": "response",
        "score_chosen": 1.0 + number,
        "score_rejected": 0.5,
        "chosen_scores": {"length": 1.0 + number},
        "rejected_scores": {"length": 0.5},
        "chosen_finished": True,
        "rejected_finished": True,
        "reward_gap": 0.5 + number,
        "heldout": number % 4 == 3,
        "defects": [],
        "dropped": "reward gap is below pairs.min_gap" if number == 0 else None,
    }


def evaluated(number):
    prompt = message("user", f"held-out question {number}")
    row = {"prompt_id": prompt_id(prompt), "prompt": prompt, "kl": 2.0, "drawn_tokens": 4}
    for side, gain in (("start", 0.0), ("trained", 1.0)):
        score = {"length": number + gain}
        row |= {side: f"{side} answer {number}", f"{side}_scores": score, f"{side}_score": number + gain}
        row |= {f"{side}_finish_reason": "stop", f"{side}_tokens": 4}
    return row


def commit(run_dir, stage, rows, summary=None):
    folder = StageFolder(str(run_dir), stage)
    folder.begin("key")
    folder.write_parts(table_of(rows), "prompt_id")
    folder.commit(Manifest(stage, "key", {}, {}, seconds=1.0, summary=summary or {}), "prompt_id")


def made_up_run(run_dir, job_table):
    """Write the run of a job up to its evaluation: 8 pairs, of which one is dropped, and 3 evaluated prompts."""
    Folder(str(run_dir)).write_bytes(JOB_FILE, to_toml(job_of(job_table, "test")).encode())
    commit(run_dir, "pairs", [pair(number) for number in range(8)])
    steps = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}]
    training = StageFolder(str(run_dir), "training")
    training.write_bytes("metrics.jsonl", "".join(json.dumps(step) + "\n" for step in steps).encode())
    training.commit(Manifest("training", "key", {}, {}))
    rows = [evaluated(number) for number in range(3)]
    commit(run_dir, "evaluation", rows, summarize(rows, {"length": 1.0}))
    return str(run_dir)
