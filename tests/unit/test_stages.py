"""What a stage depends on: a setting that changes what comes out changes its key, and no other does."""

import io
import json
import os
import sys
from types import SimpleNamespace

import pyarrow as pa
import pytest

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.execution.keys import stage_key
from rdpo.execution.pipeline import run_stages
from rdpo.execution.run import Run
from rdpo.execution.stage import Stage
from rdpo.files.stage_folder import StageFolder
from rdpo.modeling import converted
from rdpo.stages import synthesis
from rdpo.stages.table import STAGES
from rdpo.tracking.console import Console

TASK = """
name = "samples"

[[turns]]
name = "response"
samples = 2
"""


@pytest.fixture
def key(job_table):
    """The key of a stage, with some sections changed."""

    def of(stage, **changes):
        changed = {name: {**job_table[name], **of_name} for name, of_name in changes.items() if of_name is not None}
        table = {**job_table, **changed}
        settings = {one.name: one.settings for one in STAGES}[stage]
        return stage_key(stage, settings(Job.model_validate(table)), {})

    return of


def test_how_many_samples_a_turn_has_counts(job_table, key, tmp_path):
    task = tmp_path / "task.toml"
    task.write_text(TASK)
    job_table["pairs"] = {"chosen": "response_1", "rejected": "response_2"}
    two = key("synthesis", synthesis={"task": str(task)})
    task.write_text(TASK.replace("= 2", "= 3"))
    assert key("synthesis", synthesis={"task": str(task)}) != two


def test_a_word_of_the_users_that_is_named_like_a_setting_counts(key):
    one, other = (key("synthesis", synthesis={"values": {"gpus": word}}) for word in ("one", "two"))
    assert one != other


def test_where_work_is_done_and_how_much_of_it_is_shown_does_not_count(job_table, key):
    plain = key("evaluation")
    job_table["evaluation"]["engine"]["batch_rows"] = 9
    assert key("evaluation", evaluation={"samples": 7}) == plain
    assert key("evaluation", evaluation={"limit": 7}) != plain


def test_prompts_and_ready_pairs_are_read_in_other_ways(job_table, key):
    prompts = key("prompts")
    # The same tokenizer under another name is the same.
    assert key("prompts", student={"revision": "v2"}) == prompts
    job_table["synthesis"] = {}
    assert key("prompts") != prompts


def test_the_trial_of_the_rewards_depends_on_how_known_pairs_are_read(job_table, key):
    job_table["calibration"] = {"source": job_table["prompts"]["source"]}
    plain = key("calibration")
    assert key("calibration", prompts={"system": "Be kind."}) != plain
    assert key("calibration", prompts={"heldout_fraction": 0.3}) == plain


def test_checkpoints_count_where_the_best_of_them_is_taken(job_table, key):
    job_table["pairs"] = {"heldout_fraction": 0.5}
    every = [key("training", training={"checkpoint_every": steps}) for steps in (10, 50)]
    best = [key("training", training={"checkpoint_every": steps, "select": "best"}) for steps in (10, 50)]
    assert every[0] == every[1]
    assert best[0] != best[1]


def test_a_reward_made_of_another_function_is_known_by_the_file_that_names_it(job_table, key, tmp_path, monkeypatch):
    module = tmp_path / "made_reward.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    job_table["rewards"][0]["function"] = "made_reward:score"
    keys = []
    for k in (1, 2):
        text = f"import functools\ndef base(prompt, answer, row, k): return k\nscore = functools.partial(base, k={k})\n"
        module.write_text(text)
        sys.modules.pop("made_reward", None)
        keys.append(key("rewards"))
    assert keys[0] != keys[1]


def test_a_gguf_file_with_other_content_is_another_model(tmp_path, monkeypatch):
    monkeypatch.setattr(converted, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(converted, "_convert_gguf", convert)
    file = tmp_path / "student.Q4_0-1.gguf"
    file.write_bytes(b"old!")
    old = converted.dequantised(file)
    file.write_bytes(b"new!")
    os.utime(file, ns=(0, 0))
    new = converted.dequantised(file)
    assert [(folder / "weights").read_bytes() for folder in (old, new)] == [b"old!", b"new!"]


def convert(file, folder):
    assert folder.name.startswith(file.stem)
    folder.mkdir()
    (folder / "weights").write_bytes(file.read_bytes())


def test_what_is_edited_while_a_stage_is_made_makes_it_outdated(job_table, tmp_path):
    source = tmp_path / "source"
    source.write_text("old")

    def execute(run, folder, meter):
        folder.clear_parts()
        folder.write_parts(pa.table({"prompt_id": ["a"], "made_of": [source.read_text()]}), "prompt_id")
        source.write_text("new")
        return {"rows_in": 1}

    stage = Stage("prompts", (), lambda job: {"content": source.read_text()}, execute)
    made = []
    for _ in range(2):
        run = Run(Job.model_validate(job_table), str(tmp_path / "run"), Console(io.StringIO()), lambda *_: False)
        run_stages(run, [stage])
        made.append(StageFolder(run.dir, "prompts").table()["made_of"].to_pylist())
    assert made == [["old"], ["new"]]


def test_a_column_named_like_a_word_of_the_job_is_found_before_the_teacher_speaks(job_table, tmp_path):
    job_table["synthesis"] |= {"task": "counterfactual", "values": {"treatment": "a", "negative": "b"}}
    job_table["pairs"] = {"chosen": "treatment", "rejected": "negative"}
    folder = StageFolder(str(tmp_path), "prompts")
    rows = [
        {"prompt_id": name, "prompt": [], "extra": extra} for name, extra in [("x", "{}"), ("y", '{"negative": 1}')]
    ]
    folder.write_parts(pa.Table.from_pylist(rows), "prompt_id")
    run = SimpleNamespace(job=Job.model_validate(job_table), folder=lambda name: folder)
    with pytest.raises(InputError, match=r"`negative` is also a column of the prompts \(row y\)"):
        synthesis.write_answers(run)


@pytest.mark.parametrize("column", ["response", "critique", "revision"])
def test_a_column_named_like_a_turn_ends_the_run_before_the_teacher_begins(job_table, tmp_path, column):
    folder = StageFolder(str(tmp_path), "prompts")
    folder.begin("k")
    prompt = [{"role": "user", "content": "why?"}]
    others = [{"topic": "rain"}, {"topic": 'a word like "response"'}, {"topic": "sun", column: None}]
    rows = [
        {"prompt_id": name, "prompt": prompt, "extra": json.dumps(other)}
        for name, other in zip("xyz", others, strict=True)
    ]
    folder.write_parts(pa.Table.from_pylist(rows), "prompt_id")
    run = SimpleNamespace(job=Job.model_validate(job_table), folder=lambda name: folder)
    with pytest.raises(InputError, match=rf"answer `{column}` of turn `{column}` has the name of a column .*\(row z\)"):
        synthesis.write_answers(run)
