"""A run whose models think before they answer: the real engine, reference, training and evaluation; a tiny model."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rdpo.execution.reader import RunReader
from rdpo.modeling.chat import student_chat
from rdpo.modeling.masking import counted_ids, read_ids
from rdpo.records import HELDOUT
from tests.support.jobs import whole_job, write_job
from tests.support.models import CHATML

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).parents[2]
PATIENCE = 1500
MARK = "#"
"""Ends the reasoning: one byte, which a random model writes now and then."""
THINKS = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['reasoning_content'] %}{{ m['reasoning_content'] }}" + MARK + "{% endif %}{{ m['content'] }}",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, tiny_classifier):
    """A finished run with masked reasoning."""
    place = tmp_path_factory.mktemp("thinks")
    student = shutil.copytree(tiny_model, place / "student")
    settings = json.loads((student / "tokenizer_config.json").read_text())
    (student / "chat_template.jinja").unlink(missing_ok=True)
    (student / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": THINKS}))
    rows = [{"prompt": f"question {i}", "split": "heldout" if i % 4 == 0 else "train"} for i in range(24)]
    (place / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))

    table = whole_job(place / "prompts.jsonl", str(student), tiny_classifier)
    table["synthesis"] |= {"task": "best_of", "reasoning": "mask"}
    table["pairs"] = {"chosen": "best", "rejected": "worst"}
    for section in ("synthesis", "evaluation"):
        table[section]["sampling"]["max_reasoning_tokens"] = 900
    table["reference"] = {"max_length": 1020, "tokens_per_batch": 2048}
    table["training"] |= {"tokens_per_batch": 2048, "num_workers": 1, "batch_size": 4}
    job = write_job(place / "job.toml", table)
    command = [sys.executable, "-m", "rdpo", "run", job, "--run-dir", str(place / "run")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return RunReader(str(place / "run"))


def test_answers_have_their_reasoning_beside_them_or_are_dropped_for_its_sake(run):
    kept, dropped = (run.folder("synthesis").table(which).to_pylist() for which in ("", "dropped"))
    assert kept and len(kept) + len(dropped) == 18
    assert dropped
    for row in dropped:
        assert re.search("ends inside its reasoning|reasoning was cut off after|is empty", row["dropped"])
    for row in kept:
        assert row["response_1_reasoning"]
        assert MARK not in row["response_1_reasoning"]


def test_masked_reasoning_stands_between_prompt_and_answer_and_does_not_count(run):
    chat = student_chat(run.job_of("reference"))
    for row in run.folder("reference").table().to_pylist():
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_ids"]
            answer = row[side][0]["content"]
            assert chat.tokenizer.decode(read_ids(ids)).startswith(f"{row[f'{side}_reasoning']}{MARK}{answer}")
            assert counted_ids(ids) == chat.completion_ids(answer, row[f"{side}_finished"])
            assert row[f"reference_{side}_logps"] < 0


def test_both_models_think_before_they_are_scored_on_their_answers_alone(run):
    rows = run.folder("evaluation").table().to_pylist()
    assert rows
    for row in rows:
        assert row["trained_reasoning"] and row["start_reasoning"]
        assert MARK + row["trained"] not in row["trained_reasoning"]
        assert row["trained_scores"]["rm"] == row["trained_score"]


def test_kl_is_of_reasoning_and_answer(run):
    rows = run.folder("evaluation").table().to_pylist()
    measured = [row for row in rows if row.get("kl") is not None]
    assert measured
    assert all(row["kl_length"] == len(row["drawn_ids"]) for row in measured)
    assert run.job_of("pairs").pairs.heldout_fraction == 0
    assert HELDOUT in run.folder("pairs").table().column_names
