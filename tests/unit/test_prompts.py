"""Prompts: usable rows get an id and a split, bad ones a reason with file and line."""

import json

import pytest

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.files.rows import write_rows
from rdpo.files.stage_folder import StageFolder
from rdpo.synthesis.conversation import Unusable, read_prompt
from rdpo.synthesis.prompts import beside, check_templates, drop_duplicates, prompt_row, read_prompts, with_system
from rdpo.synthesis.sources import read_rows, source_files


@pytest.fixture
def job(job_table):
    return Job.model_validate(job_table)


def test_text_becomes_one_user_turn():
    messages = with_system(read_prompt("hello"), "be brief")
    assert messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("  ", "empty"),
        (None, "neither text"),
        (7, "neither text"),
        ([], "neither text"),
        ([{"role": "wizard", "content": "x"}], "role out of"),
        ([{"role": "user", "content": 3}], "the content of a message of the user is no text"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "ends with an assistant"),
    ],
)
def test_unusable_prompts_have_a_reason(value, reason):
    with pytest.raises(Unusable, match=reason):
        read_prompt(value)


def test_same_prompt_same_id_whatever_its_other_columns(job):
    first = prompt_row("a.jsonl", 1, {"prompt": "hello", "n": 1}, job)
    second = prompt_row("b.jsonl", 9, {"prompt": [{"role": "user", "content": "hello"}]}, job)
    assert first["prompt_id"] == second["prompt_id"]
    assert json.loads(first["extra"]) == {"n": 1}


def test_split_comes_from_the_source_or_from_the_id(job):
    assert prompt_row("a", 1, {"prompt": "hello", "split": "test"}, job)["split"] == "heldout"
    drawn = [prompt_row("a", i, {"prompt": f"hello {i}"}, job)["split"] for i in range(400)]
    assert 20 <= drawn.count("heldout") <= 60
    assert drawn == [prompt_row("b", 0, {"prompt": f"hello {i}"}, job)["split"] for i in range(400)]


WRAPPINGS = [f"Story {number}: {{{{ prompt }}}} ({{{{ tone }}}})" for number in range(4)]


def test_prompts_are_put_into_templates_by_their_id(job_table):
    job_table["prompts"] |= {"templates": WRAPPINGS, "heldout_templates": ["Now: {{ prompt }}"]}
    job = Job.model_validate(job_table)
    rows = [prompt_row("a", i, {"prompt": f"how {i}", "tone": "sly"}, job) for i in range(60)]
    train = [row for row in rows if row["split"] == "train"]
    drawn = [row["prompt"][0]["content"].split(":")[0] for row in train]
    assert sorted(set(drawn)) == [f"Story {number}" for number in range(4)]
    bare = [json.loads(row["extra"])["bare"] for row in train]
    assert [row["prompt"][0]["content"].split(": ")[1] for row in train] == [f"{text} (sly)" for text in bare]
    assert {row["prompt"][0]["content"][:7] for row in rows if row["split"] == "heldout"} == {"Now: how"[:7]}
    assert (
        rows[0]["prompt_id"]
        != prompt_row("a", 0, {"prompt": "how 0"}, Job.model_validate(bare_of(job_table)))["prompt_id"]
    )
    missing = prompt_row("a", 1, {"prompt": train[0]["extra"]}, job)
    assert "tone" in missing["dropped"]


@pytest.mark.parametrize(("column", "other"), [("prompt", "bare"), ("question", "prompt")])
def test_a_column_whose_name_templates_know_as_something_else_drops_the_row(job_table, column, other):
    job_table["prompts"] |= {"templates": WRAPPINGS[:1], "column": column}
    raw = {column: "how", "tone": "sly", other: "mine"}
    row = prompt_row("a", 1, raw, Job.model_validate(job_table))
    assert row["dropped"].startswith(f"{other}: ") and "rename the column" in row["dropped"]
    kept = prompt_row("a", 1, raw, Job.model_validate(bare_of(job_table)))
    assert not kept["dropped"] if "dropped" in kept else True
    assert json.loads(kept["extra"])[other] == "mine"


def bare_of(table):
    prompts = {key: value for key, value in table["prompts"].items() if "templates" not in key}
    return {**table, "prompts": prompts}


@pytest.mark.parametrize(("template", "said"), [("Tell me", "no place for the prompt"), ("{{ prompt", "template: ")])
def test_a_template_that_cannot_hold_a_prompt_is_bad_input(job_table, template, said):
    job_table["prompts"]["templates"] = [template]
    with pytest.raises(InputError, match=said):
        check_templates(Job.model_validate(job_table).prompts)


def test_long_prompt_is_dropped_not_cut(job):
    row = prompt_row("a", 1, {"prompt": "x" * 500}, job)
    assert row["dropped"] == "prompt is longer than prompts.max_prompt_tokens"
    assert row["prompt_id"] == "a:1"
    assert row["prompt"][0]["content"] == "x" * 500


def test_every_format_gives_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": "one"}, {"prompt": "two, with comma"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.csv").write_text('prompt\none\n"two, with comma"\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.csv", "c.parquet"):
        assert [row for _, row in read_rows(str(tmp_path / name))] == rows


def test_missing_source_wrong_format_and_wrong_column_are_explained(tmp_path, job_table):
    with pytest.raises(InputError, match="does not exist"):
        source_files(str(tmp_path / "none.jsonl"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="known format"):
        source_files(str(tmp_path / "notes.txt"))
    job_table["prompts"]["column"] = "question"
    with pytest.raises(InputError, match="no column `question`; it has 'prompt', 'split'"):
        read_prompts(Job.model_validate(job_table))


def stored_prompts(job_table, tmp_path):
    folder = StageFolder(str(tmp_path), "prompts")
    folder.begin("k")
    write_rows(read_prompts(Job.model_validate(job_table)), folder, "prompt_id", lambda block: None)
    drop_duplicates(folder)
    kept = [{**row, "dropped": None} for row in folder.table().to_pylist()]
    return sorted(kept + folder.table("dropped").to_pylist(), key=lambda row: (row["source"], row["line"]))


@pytest.mark.ray
def test_bad_lines_are_dropped_with_their_reasons(ray_cluster, job_table, tmp_path):
    lines = [
        b'{"prompt": "good", "split": "train"}',
        b"not json",
        b'{"prompt": "\xff\xfe"}',
        b'["a list"]',
        b'{"prompt": ""}',
        b'{"other": "column"}',
        b'{"prompt": "good", "split": "heldout"}',
        b"",
        b'{"prompt": "\\ud800 lone"}',
    ]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    job_table["prompts"]["source"] = str(tmp_path / "bad.jsonl")
    rows = stored_prompts(job_table, tmp_path)
    assert [(row["line"], row["dropped"]) for row in rows] == [
        (1, None),
        (2, "line is not JSON"),
        (3, "line is not UTF-8"),
        (4, "line is not a JSON object"),
        (5, "prompt: empty"),
        (6, "prompt: neither text nor a list of messages"),
        (7, "duplicate of an earlier prompt"),
        (9, None),
    ]
    assert len({row["prompt_id"] for row in rows}) == len(rows)


@pytest.mark.ray
def test_a_limit_counts_over_all_files_and_the_first_of_duplicates_stays(ray_cluster, job_table, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name, texts in {"a": ["one", "two", "one"], "b": ["two", "three", "one"], "c": ["four"]}.items():
        (source / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    job_table["prompts"] |= {"source": str(source), "limit": 5}
    rows = [(row["source"][-7], row["line"], row["dropped"]) for row in stored_prompts(job_table, tmp_path)]
    duplicate = "duplicate of an earlier prompt"
    assert rows == [("a", 1, None), ("a", 2, None), ("a", 3, duplicate), ("b", 1, duplicate), ("b", 2, None)]


def test_another_source_is_not_put_into_the_templates(job_table):
    job_table["prompts"] |= {"templates": WRAPPINGS, "system": "be brief"}
    settings = Job.model_validate(job_table).prompts
    other = beside(settings, "known.jsonl", "question", 5)
    assert (other.templates, other.heldout_templates, other.system) == ([], [], "be brief")
    assert (other.source, other.column, other.limit) == ("known.jsonl", "question", 5)
    assert other.max_prompt_tokens == settings.max_prompt_tokens
