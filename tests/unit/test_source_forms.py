"""The form of a source is seen from the whole of its beginning, not from its first row."""

import csv
import io
import json

import pyarrow as pa
import pytest

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.files.compressed import ENDINGS
from rdpo.synthesis.columns import check_columns, needed_columns
from rdpo.synthesis.given import answered
from rdpo.synthesis.prompts import prompt_row
from rdpo.synthesis.sources import content_hash, file_splits, first_rows, read_rows, source_files

ROWS = [{"prompt": f"question {i}", "chosen": "a", "rejected": "b"} for i in range(3)]


@pytest.fixture
def job(job_table):
    del job_table["synthesis"], job_table["rewards"]
    return Job.model_validate(job_table)


def test_a_first_row_without_a_column_does_not_speak_for_the_others(tmp_path, job):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [{"prompt": "Say hello.", "chosen": "Hello."}, *ROWS]))
    check_columns(str(path), first_rows(str(path)), needed_columns(job))
    dropped = [prompt_row("pairs.jsonl", line, row, job).get("dropped") for line, row in read_rows(str(path))]
    assert dropped[0] == "rejected: neither text nor a list of messages"
    assert not any(dropped[1:])


@pytest.mark.parametrize("beginning", ["", "\ufeff", "\n  "])
def test_a_json_array_is_its_entries(tmp_path, beginning):
    path = tmp_path / "pairs.json"
    path.write_text(beginning + json.dumps([*ROWS, 7], indent=1), encoding="utf-8")
    assert list(read_rows(str(path))) == [*enumerate(ROWS, start=1), (4, "entry is not a JSON object")]


def test_a_json_array_that_is_broken_is_one_message(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(ROWS)[:-1])
    with pytest.raises(InputError, match=r"begins like a JSON array and is none: .*; write one object a line"):
        list(read_rows(str(path)))


def test_one_broken_first_line_does_not_make_an_array_of_json_lines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("[\n" + "\n".join(map(json.dumps, ROWS)))
    assert list(read_rows(str(path))) == [(1, "line is not JSON"), *enumerate(ROWS, start=2)]


def in_form(rows, form):
    """The rows as the bytes of a file with this ending."""
    if form == ".json":
        return json.dumps(rows).encode()
    if form == ".jsonl":
        return "\n".join(map(json.dumps, rows)).encode()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def packed(content, ending):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, ENDINGS[ending]) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("ending", sorted(ENDINGS))
@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv"])
def test_a_compressed_file_has_the_rows_of_the_plain_one(tmp_path, form, ending):
    for name, content in (("train", in_form(ROWS, form)), ("test", in_form(ROWS[:1], form))):
        (tmp_path / f"{name}{form}{ending}").write_bytes(packed(content, ending))
        (tmp_path / f"{name}.txt").write_bytes(content)
    test, train = files = source_files(str(tmp_path))
    assert [row for _, row in read_rows(train)] == ROWS
    assert file_splits(files) == {test: "test", train: "train"}
    assert content_hash(train) != content_hash(test)


def test_json_lines_with_a_broken_first_one_are_read_compressed_too(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(packed(b"[\n" + in_form(ROWS, ".jsonl"), ".gz"))
    assert list(read_rows(str(path))) == [(1, "line is not JSON"), *enumerate(ROWS, start=2)]


@pytest.mark.parametrize("ending", sorted(ENDINGS))
@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv"])
def test_compressed_data_under_a_plain_name_is_one_message(tmp_path, form, ending):
    path = tmp_path / f"pairs{form}"
    path.write_bytes(packed(in_form(ROWS, form), ending))
    with pytest.raises(InputError, match=f"pairs{form}: line 1 is compressed data, and no text; .* end in {ending}"):
        first_rows(str(path))
    twice = tmp_path / f"pairs{form}.gz"
    twice.write_bytes(packed(path.read_bytes(), ".gz"))
    with pytest.raises(InputError, match="unpack it once"):
        first_rows(str(twice))


@pytest.mark.parametrize("name", ["pairs.jsonl.bz2", "pairs.parquet.gz", "pairs.gz"])
def test_other_compressed_files_are_of_no_known_format(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"no file of a known format .*jsonl\.gz"):
        source_files(str(tmp_path / name))


def test_dialogues_as_text_are_refused_with_the_form_that_is_needed(tmp_path, job):
    rows = [{side: f"\n\nHuman: q\n\nAssistant: {side}" for side in ("chosen", "rejected")}]
    with pytest.raises(InputError, match="has no column `prompt`, and `chosen` is text; write the prompt in a column"):
        check_columns("hh.jsonl", rows, needed_columns(job))
    as_text = [{side: repr([{"role": "user", "content": "q"}]) for side in ("chosen", "rejected")}]
    check_columns("text.jsonl", as_text, needed_columns(job))


def test_scores_of_a_csv_file_are_numbers(tmp_path, job):
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "rejected", "score_chosen", "score_rejected"])
        writer.writerows([["q", "a" * 200_000, "b", "4.5", "2"], ["r", "a", "b", "", ""], ["s", "a", "b", "high", "1"]])
    rows = [answered(prompt_row("pairs.csv", line, row, job)) for line, row in read_rows(str(path))]
    assert (rows[0]["chosen_scores"], rows[0]["rejected_scores"]) == ({"given": 4.5}, {"given": 2.0})
    assert (rows[1]["dropped"], rows[1]["chosen_scores"]) == (None, None)
    assert rows[2]["dropped"] == "score_chosen is not a finite number"


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["d/test.jsonl", "d/train.jsonl"], {"d/test.jsonl": "test", "d/train.jsonl": "train"}),
        (
            ["d/train-00000.parquet", "d/val-00000.parquet"],
            {"d/train-00000.parquet": "train", "d/val-00000.parquet": "val"},
        ),
        (["d/train-0.parquet", "d/train-1.parquet"], {}),
        (["d/test.jsonl"], {}),
        (["d/testament.jsonl", "d/trainers.jsonl"], {}),
    ],
)
def test_files_of_a_folder_that_are_named_after_splits_are_in_them(files, splits):
    assert file_splits(files) == splits


@pytest.mark.parametrize(
    ("named", "split"),
    [
        ("val", "heldout"),
        ("Test", "heldout"),
        ("test_prefs", "heldout"),
        ("train_prefs", "train"),
        ("reward", "reward"),
    ],
)
def test_splits_by_their_usual_names(job, named, split):
    assert prompt_row("pairs.jsonl", 1, {**ROWS[0], "split": named}, job)["split"] == split
