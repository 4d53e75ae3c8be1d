"""Jobs over the tiny model, as tables, and the files that they read."""

import json
from pathlib import Path

ALL_STAGES = (
    *("prompts", "calibration", "synthesis", "rewards", "pairs", "reference"),
    *("training", "policy", "evaluation", "model"),
)


def valid_job(tiny_model, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"question {i}", "split": split_of(i)} for i in range(12)])
    return {
        "name": "tiny",
        "student": {"model": tiny_model, "dtype": "float32"},
        "prompts": {"source": str(tmp_path / "prompts.jsonl"), "max_prompt_tokens": 128},
        "synthesis": {
            "task": "roleplay",
            "sampling": {"max_tokens": 6, "temperature": 1.0},
            "engine": {"max_model_len": 1024, "kv_cache_gib": 1, "batch_rows": 4},
        },
        "rewards": [{"kind": "function", "name": "length", "function": "tests.rewards:length"}],
        "reference": {"max_length": 256, "tokens_per_batch": 1024},
        "training": {"batch_size": 4, "tokens_per_batch": 1024, "learning_rate": 1e-3},
        "evaluation": {"sampling": {"max_tokens": 6}, "engine": {"max_model_len": 256, "kv_cache_gib": 1}},
    }


def whole_job(source, student, classifier):
    """The tables of a job from end to end, in fp32, with two training workers and checkpoints."""
    engine = {"max_model_len": 1024, "kv_cache_gib": 1, "batch_rows": 4, "batches_in_flight": 1}
    engine["options"] = {"dtype": "float32"}
    speech = {"sampling": {"max_tokens": 8, "temperature": 1.0}, "engine": engine}
    return {
        "name": "tiny",
        "student": {"model": student, "dtype": "float32"},
        "prompts": {"source": str(source), "max_prompt_tokens": 128},
        "synthesis": {"task": "roleplay", **speech},
        "rewards": [{"kind": "classifier", "name": "rm", "model": classifier, "dtype": "float32"}],
        "pairs": {"direction": "reward"},
        "reference": {"max_length": 256, "tokens_per_batch": 1024},
        "training": {
            "batch_size": 4,
            "tokens_per_batch": 1024,
            "num_workers": 2,
            "learning_rate": 1e-3,
            "checkpoint_every": 2,
            "lora": {"rank": 4},
        },
        "evaluation": speech,
    }


def split_of(index):
    return "heldout" if index % 4 == 0 else "train"


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_job(path, table):
    import tomli_w

    Path(path).write_text(tomli_w.dumps(table), encoding="utf-8")
    return str(path)
