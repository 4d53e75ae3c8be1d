"""Stage folders: counted, checked, whole or not at all."""

import json
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rdpo.errors import ConservationError, InputError
from rdpo.files.content import FOOTER
from rdpo.files.duplicates import duplicates, remove_duplicates
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder

ROWS = [
    {"prompt_id": "a", "x_tokens": 3, "note": None, "dropped": None},
    {"prompt_id": "b", "x_tokens": 4, "note": None, "dropped": "too long"},
    {"prompt_id": "c", "x_tokens": 5, "note": None, "dropped": None},
]


def manifest(key="k"):
    return Manifest("stage", key, {}, {})


@pytest.fixture
def folder(tmp_path):
    folder = StageFolder(str(tmp_path), "stage")
    folder.begin("k")
    return folder


def write(folder, rows=ROWS):
    return folder.write_parts(pa.Table.from_pylist(rows), "prompt_id")


def test_rows_in_equal_rows_out_and_dropped(folder):
    progress = write(folder)
    committed = folder.commit(manifest(), "prompt_id", expected=3)
    assert (progress.rows, progress.dropped, progress.tokens) == (2, 1, 8)
    assert (committed.rows_in, committed.rows_out, committed.dropped) == (3, 2, {"too long": 1})
    assert folder.manifest() == committed


def test_a_lost_row_stops_the_run(folder):
    write(folder)
    with pytest.raises(ConservationError, match="4 rows in, but 2 out and 1 dropped"):
        folder.commit(manifest(), "prompt_id", expected=4)
    assert folder.manifest() is None


def test_a_row_made_twice_stops_the_run(folder):
    write(folder)
    write(folder, [*ROWS[:1], {**ROWS[2], "prompt_id": "d"}])
    with pytest.raises(ConservationError, match="duplicate ids, the first is a"):
        folder.commit(manifest(), "prompt_id", expected=4)


def test_a_large_block_becomes_several_parts(folder, monkeypatch):
    monkeypatch.setattr("rdpo.files.parts.PART_ROWS", 2)
    progress = write(folder, [{**ROWS[index % 3], "prompt_id": str(index)} for index in range(9)])
    assert (progress.rows, progress.dropped, progress.tokens) == (6, 3, 24)
    assert (len(folder.parts()), len(folder.names(".parquet", "dropped"))) == (3, 2)
    assert sorted(folder.done_ids("prompt_id").to_pylist()) == sorted(map(str, range(9)))


def test_duplicates_are_found_among_kept_and_dropped_rows(folder):
    write(folder)
    assert not duplicates(folder, "prompt_id")
    write(folder, [{**ROWS[1], "dropped": None}, {**ROWS[0], "prompt_id": "d"}])
    assert duplicates(folder, "prompt_id") == {"b"}
    assert (folder.count(), folder.count("dropped")) == (4, 1)


def test_the_same_block_again_replaces_itself(folder):
    write(folder)
    write(folder, ROWS[::-1])
    assert folder.commit(manifest(), "prompt_id", expected=3).rows_out == 2


def test_unfinished_parts_stay_for_the_same_key_and_go_for_another(folder):
    write(folder)
    folder.begin("k")
    assert sorted(folder.done_ids("prompt_id").to_pylist()) == ["a", "b", "c"]
    begun = folder.attempt_id
    folder.begin("k")
    assert folder.attempt_id == begun
    folder.begin("other")
    assert len(folder.done_ids("prompt_id")) == 0
    assert folder.attempt_id != begun


def test_committed_folder_is_emptied_when_begun_again(folder):
    write(folder)
    folder.commit(manifest(), "prompt_id", expected=3)
    folder.begin("k")
    assert folder.manifest() is None
    assert folder.parts() == []


def test_columns_that_are_empty_in_one_part_do_not_break_reading(folder, ray_cluster):
    write(folder, [{**ROWS[0], "scores": None}])
    write(folder, [{**ROWS[2], "note": "text", "scores": {"one": 1.0}}])
    assert sorted(folder.table()["note"].to_pylist(), key=str) == [None, "text"]
    rows = sorted(folder.dataset().take_all(), key=lambda row: row["prompt_id"])
    assert [row["note"] for row in rows] == [None, "text"]
    assert rows[1]["scores"] == {"one": 1.0}


def test_temporary_files_do_not_count(folder, tmp_path):
    write(folder)
    (tmp_path / "stage" / "part-x.parquet.1234.tmp").write_bytes(b"half")
    assert len(folder.parts()) == 1


def test_digest_follows_content(folder, tmp_path):
    write(folder)
    first = folder.commit(manifest(), "prompt_id", expected=3)
    other = StageFolder(str(tmp_path / "other"), "stage")
    other.begin("k")
    write(other, [{**ROWS[0], "x_tokens": 9}, *ROWS[1:]])
    assert other.commit(manifest(), "prompt_id", expected=3).digest != first.digest
    assert json.loads((tmp_path / "stage" / "manifest.json").read_text())["digest"] == first.digest


def test_unwritable_place_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((InputError, NotADirectoryError, FileExistsError)):
        StageFolder(str(tmp_path / "file"), "stage").begin("k")


def two_parts(folder):
    for row in (ROWS[0], ROWS[2]):
        write(folder, [row])
    return folder.parts()


def spoil(path):
    """Change a byte among the values of the first column."""
    content = bytearray(path.read_bytes())
    content[40] ^= 0xFF
    path.write_bytes(content)


def spoil_sums(path):
    """Change the hashes in the footer."""
    table = pq.read_table(path)
    (footer,) = table.schema.metadata.values()
    pq.write_table(table.replace_schema_metadata({FOOTER: footer.replace(b'"prompt_id": ', b'"prompt_id": 1')}), path)


@pytest.mark.parametrize(
    "damage", [spoil, lambda path: path.write_bytes(path.read_bytes()[:-40]), lambda path: path.unlink()]
)
def test_a_damaged_part_of_a_committed_folder_is_found_and_alone_made_again(folder, tmp_path, damage):
    kept, broken = two_parts(folder)
    before = folder.commit(manifest(), "prompt_id", expected=2)
    assert folder.damaged() == []
    damage(tmp_path / "stage" / broken)
    assert folder.damaged() == [broken]
    folder.reopen([broken])
    folder.begin("k")
    assert folder.parts() == [kept]
    two_parts(folder)
    assert folder.commit(manifest(), "prompt_id", expected=2).digest == before.digest


@pytest.mark.parametrize("damage", [spoil, spoil_sums, lambda path: path.write_bytes(b"")])
def test_a_damaged_part_of_an_unfinished_folder_goes_when_it_is_taken_up(folder, tmp_path, damage):
    kept, broken = two_parts(folder)
    damage(tmp_path / "stage" / broken)
    folder.begin("k")
    assert folder.parts() == [kept]


def test_a_manifest_that_is_not_whole_is_none(folder, tmp_path):
    write(folder)
    folder.commit(manifest(), "prompt_id")
    (tmp_path / "stage" / "manifest.json").write_text('{"stage": "sta')
    assert folder.manifest() is None


def test_a_reopened_folder_is_another_attempt(folder):
    kept, broken = two_parts(folder)
    folder.commit(manifest(), "prompt_id")
    before = folder.attempt_id
    folder.reopen([broken])
    assert folder.attempt_id not in ("", before)
    reopened = folder.attempt_id
    folder.begin("k")
    assert (folder.attempt_id, folder.parts()) == (reopened, [kept])


@pytest.mark.parametrize("below", ["", "dropped"])
def test_a_part_that_the_manifest_does_not_name_is_not_read_and_goes_when_reopened(folder, tmp_path, below):
    write(folder)
    committed = folder.commit(manifest(), "prompt_id", expected=3)
    stray = StageFolder(str(tmp_path / "other"), "stage")
    stray.begin("k")
    write(stray, [{**ROWS[1 if below else 0], "prompt_id": "stray"}])
    (name,) = stray.parts(below)
    folder.write_bytes(name, stray.read_bytes(name))
    assert folder.damaged() == []
    assert (folder.count(), folder.count("dropped"), folder.total("_tokens")) == (2, 1, 8)
    assert sorted(folder.done_ids("prompt_id").to_pylist()) == ["a", "b", "c"]
    assert folder.reasons() == committed.dropped
    folder.reopen([])
    folder.begin("k")
    assert folder.commit(manifest(), "prompt_id", expected=3).digest == committed.digest


def test_a_committed_part_that_is_missing_is_named_and_not_left_out(folder, tmp_path):
    write(folder)
    folder.commit(manifest(), "prompt_id")
    (tmp_path / "stage" / folder.parts()[0]).unlink()
    with pytest.raises(InputError, match=r"part-.*parquet: is missing; `rdpo run` makes it again"):
        folder.table()


@pytest.mark.parametrize(
    "blocks",
    [
        ["ab", "ac"],
        ["ab", "ac", "c"],
        ["c", "ac", "ab"],
        ["ab", "bc", "ca"],
        ["ab", "B"],
        ["aB", "b", "c"],
        ["aa", "b"],
    ],
)
def test_of_rows_that_were_stored_twice_one_of_each_id_stays(folder, blocks):
    """Capitals are dropped rows of the same ids."""
    for block in blocks:
        reasons = [("reason" if name.isupper() else None) for name in block]
        rows = [{"prompt_id": name.lower(), "dropped": why} for name, why in zip(block, reasons, strict=True)]
        write(folder, rows)
    kept = {name for block in blocks for name in block if name.islower()}
    ids = {name.lower() for block in blocks for name in block}
    before = folder.count() + folder.count("dropped")
    assert remove_duplicates(folder, "prompt_id") == before - len(ids)
    assert set(folder.ids("prompt_id").to_pylist()) == kept
    assert sorted(folder.done_ids("prompt_id").to_pylist()) == sorted(ids)
    assert remove_duplicates(folder, "prompt_id") == 0
    folder.commit(manifest(), "prompt_id", expected=len(ids))


def taken_from(folder, tmp_path, **how):
    taken = StageFolder(str(tmp_path / "taker"), "stage")
    return taken, taken.take_over(folder, **how)


@pytest.mark.parametrize("share", [True, False])
def test_an_edit_of_what_was_copied_does_not_reach_the_other(folder, tmp_path, share):
    folder.write_bytes("weights", b"some")
    folder.commit(manifest())
    taken, _ = taken_from(folder, tmp_path, share=share)
    with open(taken.address("weights"), "r+b") as file:
        file.write(b"edit")
    assert bool(folder.damaged()) == share


@pytest.mark.parametrize("meanwhile", ["begun", "made again", "reopened", "cleared"])
def test_what_its_own_driver_begins_again_meanwhile_is_not_taken(folder, tmp_path, monkeypatch, meanwhile):
    two_parts(folder)
    folder.commit(manifest(), "prompt_id")
    take = StageFolder._take
    first = threading.Lock()

    def take_late(self, other, name, share):
        take(self, other, name, share)
        # Files are taken by many threads at once; the other driver begins again once.
        if name.endswith(".parquet") and first.acquire(blocking=False):
            if meanwhile == "cleared":
                folder.clear()
            elif meanwhile == "reopened":
                folder.reopen([])
            else:
                folder.begin("k")
            if meanwhile == "made again":
                two_parts(folder)
                folder.commit(manifest(), "prompt_id")

    monkeypatch.setattr(StageFolder, "_take", take_late)
    taken, whole = taken_from(folder, tmp_path)
    assert (whole, taken.files()) == (False, [])
