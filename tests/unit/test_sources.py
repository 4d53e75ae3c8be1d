"""Sources: what is wrong with one is said in the name of the setting that it stands in; and by what one is known."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.evaluation.retention import texts
from rdpo.preference.calibration import calibrate
from rdpo.preference.replay import offline_pairs
from rdpo.stages.checks import check_other_sources
from rdpo.stages.table import stages_of
from rdpo.synthesis.prompts import read_prompts
from rdpo.synthesis.sources import _file_tables, content_hash
from tests.support.jobs import write_jsonl

SECTIONS = ("prompts", "calibration", "replay", "retention")
READ = {
    "prompts": read_prompts,
    "calibration": calibrate,
    "replay": lambda job: offline_pairs(job, job.replay),
    "retention": lambda job: texts(job, job.retention),
}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def job_with(job_table, section, source, **more):
    return Job.model_validate({**job_table, section: {**job_table.get(section, {}), "source": str(source), **more}})


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("name", ["none.jsonl", "notes.txt", "packed.jsonl"])
def test_a_source_that_cannot_be_read_is_named_by_its_setting_before_any_work(job_table, tmp_path, section, name):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "packed.jsonl").write_bytes(b"\x1f\x8b")
    job = job_with(job_table, section, tmp_path / name)
    (stage,) = (stage for stage in stages_of(job) if stage.name == section)
    with pytest.raises(InputError) as refused:
        stage.settings(job)
    assert str(refused.value).startswith(f"{section}.source: {tmp_path / name}")


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("array.json", b"[1,", "begins like a JSON array"),
        ("broken.parquet", b"PAR1", "not a readable Parquet file"),
        ("bare.jsonl", b"x\n", "no readable row"),
        ("cut.jsonl.gz", b"\x1f\x8b", "cut off"),
        ("long.csv", b"prompt\n" + b"x" * ((16 << 20) + 2), "is longer than"),
    ],
)
def test_a_file_of_no_use_is_named_by_its_setting(job_table, tmp_path, section, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as refused:
        READ[section](job_with(job_table, section, tmp_path / name))
    assert str(refused.value).startswith(f"{section}.source: ")


@pytest.mark.parametrize(
    ("section", "row", "setting"),
    [
        ("prompts", {"other": 1}, "prompts.column"),
        ("calibration", {"chosen": "a", "rejected": "b"}, "prompts.column"),
        ("calibration", {"prompt": "q", "chosen": "a"}, "calibration.source"),
        ("replay", {"chosen": "a", "rejected": "b"}, "replay.column"),
        ("replay", {"prompt": "q", "chosen": "a"}, "replay.source"),
        ("retention", {"answer": "a"}, "retention.column"),
        ("retention", {"prompt": "q"}, "retention.answer"),
    ],
)
def test_a_column_that_is_missing_is_named_by_its_setting(job_table, tmp_path, section, row, setting):
    write_jsonl(tmp_path / "rows.jsonl", [row])
    job = job_with(job_table, section, tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match=r"rows\.jsonl has no column") as refused:
        READ[section](job)
    assert str(refused.value).startswith(f"{setting}: ")

    if section in ("replay", "retention"):
        with pytest.raises(InputError, match=setting):
            check_other_sources(job)


def test_what_a_worker_finds_is_named_by_its_setting(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    shares = pa.table({"path": [str(tmp_path / "broken.parquet")], "rows": [None], "split": [None]})
    with pytest.raises(InputError, match=r"^replay\.source: .* is not a readable Parquet file"):
        list(_file_tables(shares, "replay.source"))


@pytest.mark.parametrize(
    ("one", "other", "content", "same"),
    [
        ("a.jsonl", "b.jsonl", json.dumps(PAIR), True),
        # Lines that begin like none of an array are read alike under both names.
        ("a.json", "a.jsonl", json.dumps(PAIR), True),
        ("a.json", "a.jsonl", json.dumps([PAIR]), False),
        ("a.json", "a.jsonl", "[\n" + json.dumps(PAIR) + "\n]", True),
        ("a.csv", "a.jsonl", "prompt\nq\n", False),
        ("a.csv", "a.jsonl", json.dumps(PAIR), False),
        ("a.csv", "b.csv", "prompt\nq\n", True),
    ],
)
def test_a_source_is_known_by_its_content_and_the_form_in_which_it_is_read(tmp_path, one, other, content, same):
    for name in (one, other):
        (tmp_path / name).write_text(content)
    assert (content_hash(str(tmp_path / one)) == content_hash(str(tmp_path / other))) is same


def test_the_usual_form_of_a_content_is_known_by_the_content_alone(tmp_path):
    import hashlib

    written = {
        "a.jsonl": json.dumps(PAIR).encode(),
        "b.json": b"\xef\xbb\xbf " + json.dumps([PAIR]).encode(),
        "c.csv": b"prompt\nq\n",
        "d.jsonl": b"",
    }
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
        assert content_hash(str(tmp_path / name)) == hashlib.blake2b(content, digest_size=16).hexdigest()
    pq.write_table(pa.Table.from_pylist([PAIR]), tmp_path / "e.parquet")
    plain = content_hash(str(tmp_path / "e.parquet"))
    assert plain == hashlib.blake2b((tmp_path / "e.parquet").read_bytes(), digest_size=16).hexdigest()
    (tmp_path / "e.parquet").rename(tmp_path / "e.jsonl")
    assert content_hash(str(tmp_path / "e.jsonl")) != plain


def test_names_that_put_files_into_splits_count_and_runs_of_earlier_versions_are_still_known(tmp_path):
    for folder, names in (("plain", ("a.jsonl", "b.jsonl")), ("split", ("test.jsonl", "train.jsonl"))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(json.dumps(PAIR) + "\n")
    plain, split = (content_hash(str(tmp_path / folder)) for folder in ("plain", "split"))
    assert plain != split
    assert split.former() == plain


def test_several_csv_files_are_not_one_with_their_headers_in_it(tmp_path):
    (tmp_path / "two").mkdir()
    for name in ("a.csv", "b.csv"):
        (tmp_path / "two" / name).write_text("prompt\nq\n")
    (tmp_path / "one.csv").write_text("prompt\nq\n" * 2)
    assert content_hash(str(tmp_path / "two")) != content_hash(str(tmp_path / "one.csv"))
