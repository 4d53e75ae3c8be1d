"""Prompts that are made, with a real engine: written, made again as they were, and read by the stage behind."""

import io
import json

import pytest

from rdpo.config import Job
from rdpo.execution.pipeline import run_stages
from rdpo.execution.run import Run
from rdpo.files.rows import write_rows
from rdpo.files.stage_folder import StageFolder
from rdpo.stages.made import numbers
from rdpo.stages.table import stages_of
from rdpo.synthesis.made import BROKEN, CUT_OFF, EMPTY, read_made
from rdpo.tracking.console import Console
from tests.support.jobs import write_jsonl

pytestmark = pytest.mark.ray

COUNT = 40


def run_of(table, folder):
    return Run(Job.model_validate(table), str(folder), Console(io.StringIO()), lambda *_: False)


def rows_of(run, stage):
    """Prompts by id, and the reasons of those that were dropped."""
    kept, lost = (run.folder(stage).table(below).to_pylist() for below in ("", "dropped"))
    return {row["prompt_id"]: row["prompt"][-1]["content"] for row in kept}, [row["dropped"] for row in lost]


@pytest.mark.slow
@pytest.mark.long
def test_a_model_writes_prompts_and_the_same_again(ray_cluster, job_table, tmp_path):
    # A random model hardly ever ends by itself.
    sampling = {"temperature": 1.0, "max_tokens": 48, "stop": ["a", "e", "3"]}
    engine = {"max_model_len": 256, "kv_cache_gib": 1, "batch_rows": 4, "dtype": "float32"}
    made = {"kind": "magpie", "count": COUNT, "sampling": sampling, "engine": engine}
    job_table["prompts"] = {"made": made, "max_prompt_tokens": 128, "heldout_fraction": 0.4}
    run = run_of(job_table, tmp_path / "run")
    stages = stages_of(run.job)[:2]
    run_stages(run, stages)

    written, reasons = rows_of(run, "made")
    assert len(written) > 5
    assert len(written) + len(reasons) == COUNT
    assert set(reasons) <= {CUT_OFF, EMPTY, BROKEN}
    prompts, _ = rows_of(run, "prompts")
    assert set(prompts.values()) <= set(written.values())
    assert run.require("made").tokens > 0
    [extra] = set(run.folder("prompts").table()["extra"].to_pylist())
    assert json.loads(extra) == {}

    # A part is lost: what was in it is written again, word by word.
    folder = run.folder("made")
    before = run.require("made").columns
    folder.reopen([folder.parts()[0]])
    again = run_of(job_table, tmp_path / "run")
    run_stages(again, stages)
    assert again.made == {"made"}
    assert again.require("made").columns == before


def test_the_same_prompt_out_of_two_blocks_is_two_rows(ray_cluster, job_table, tmp_path):
    import ray

    job_table["prompts"] = {"made": {"kind": "magpie", "count": 6}, "max_prompt_tokens": 128}
    prompt = [{"role": "user", "content": "Why?"}]
    rows = ray.data.from_items([{"number": number, "prompt": prompt} for number in range(6)], override_num_blocks=6)
    folder = StageFolder(str(tmp_path), "prompts")
    write_rows(read_made(rows, Job.model_validate(job_table)), folder, "prompt_id", lambda block: None)
    assert sorted(folder.table()["line"].to_pylist()) == [*range(6)]


def test_personas_and_topics_are_drawn_for_each_number(ray_cluster, job_table, tmp_path):
    write_jsonl(tmp_path / "who.jsonl", [{"who": f"person {number}"} for number in range(5)])
    write_jsonl(tmp_path / "what.jsonl", [{"what": f"topic {number}"} for number in range(4)])
    job_table["prompts"] = {
        "made": {
            "kind": "personas",
            "count": 30,
            "template": "{{ persona }} {{ topic }}",
            "personas": {"source": str(tmp_path / "who.jsonl"), "column": "who"},
            "topics": {"source": str(tmp_path / "what.jsonl"), "column": "what", "limit": 3},
        }
    }
    source = numbers(run_of(job_table, tmp_path / "run"))
    rows = sorted(source.rows().take_all(), key=lambda row: row["number"])
    assert [row["prompt_id"] for row in rows] == source.ids().to_pylist()
    drawn = [(row["persona"], row["topic"]) for row in rows]
    assert len(set(drawn[:15])) == 15
    assert {topic for _, topic in drawn} == {"topic 0", "topic 1", "topic 2"}
    job_table["prompts"]["made"]["count"] = 4
    fewer = numbers(run_of(job_table, tmp_path / "run")).rows().take_all()
    assert sorted((row["persona"], row["topic"]) for row in fewer) == sorted(drawn[:4])
