"""A whole run with every pool on one GPU: engine, classifier, judge, reference, training, evaluation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import ALL_STAGES, whole_job, write_job, write_jsonl
from tests.support.models import save_model, tiny_config

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


def test_every_pool_runs_on_the_gpu_and_the_model_is_published(tmp_path, tokenizer):
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    from rdpo.files.stage_folder import StageFolder

    torch.manual_seed(2)
    config = tiny_config(tokenizer, tie_word_embeddings=False, initializer_range=0.2, **SHAPE)
    student = save_model(tmp_path / "student", LlamaForCausalLM(config), tokenizer)
    head = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1, **SHAPE))
    classifier = save_model(tmp_path / "reward", head, tokenizer)
    write_jsonl(
        tmp_path / "prompts.jsonl",
        [{"prompt": f"question {i}", "split": "train" if i % 4 else "heldout"} for i in range(20)],
    )

    table = whole_job(tmp_path / "prompts.jsonl", student, classifier)
    table["student"]["dtype"] = "bfloat16"
    engine = {"gpus": 1, "max_model_len": 1024}
    options = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 1 << 30, "enforce_eager": True}
    table["synthesis"]["engine"] = table["evaluation"]["engine"] = {**engine, "options": options}
    table["rewards"][0] |= {"gpus": 1, "dtype": "bfloat16"}
    table["reference"]["gpus"] = 1
    table["training"] |= {"num_workers": 1, "gpus_per_worker": 1}
    job = write_job(tmp_path / "job.toml", table)

    command = [sys.executable, "-m", "rdpo", "run", job, "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    log = tmp_path / "run" / "logs" / "libraries.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-4000:] if log.exists() else "")
    assert all(StageFolder(str(tmp_path / "run"), stage).manifest() for stage in ALL_STAGES)
    steps = [json.loads(line) for line in (tmp_path / "run/training/metrics.jsonl").read_text().splitlines()]
    assert all(0 < step["peak_memory_gib"] < 20 for step in steps)
