"""Any rows in any blocks: the folder gives the same rows back, counts them, and finds duplicate ids."""

import tempfile
from collections import Counter
from itertools import pairwise

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdpo.errors import ConservationError
from rdpo.files.duplicates import duplicates
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder
from rdpo.records import table_of

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": TEXT}), max_size=3)
ROW = st.fixed_dictionaries(
    {
        "prompt": MESSAGES,
        "answer": st.none() | TEXT,
        "answer_tokens": st.integers(0, 2**40),
        "score": st.none() | st.floats(allow_nan=False),
        "dropped": st.none() | TEXT.filter(bool),
    }
)
IDS = st.lists(TEXT, min_size=1, max_size=8)


def drawn(data, ids):
    """Rows with these ids, cut into blocks somewhere."""
    rows = [{"prompt_id": name, **data.draw(ROW)} for name in ids]
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(rows) - 1)))))
    ends = [0, *cuts, len(rows)]
    return rows, [block for start, end in pairwise(ends) if (block := rows[start:end])]


def by_id(rows):
    return sorted(rows, key=lambda row: row["prompt_id"])


def written(place, blocks):
    folder = StageFolder(place, "stage")
    folder.begin("k")
    counts = [folder.write_parts(table_of(block), "prompt_id") for block in blocks]
    return folder, counts


@given(st.data(), st.sets(TEXT, min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_the_same_rows_come_out_of_any_blocks(data, ids):
    rows, blocks = drawn(data, sorted(ids))
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr("rdpo.files.parts.PART_ROWS", 3)
        folder, counts = written(place, blocks)
        kept = [{name: row[name] for name in row if name != "dropped"} for row in rows if row["dropped"] is None]
        lost = [row for row in rows if row["dropped"] is not None]
        assert by_id(folder.table().to_pylist()) == by_id(kept)
        assert by_id(folder.table("dropped").to_pylist()) == by_id(lost)
        assert sum(count.tokens for count in counts) == folder.total("_tokens") == sum(r["answer_tokens"] for r in kept)
        assert sorted(folder.done_ids("prompt_id").to_pylist()) == sorted(ids)
        manifest = folder.commit(Manifest("stage", "k", {}, {}), "prompt_id", len(rows))
        assert (manifest.rows_out, manifest.dropped) == (len(kept), dict(Counter(row["dropped"] for row in lost)))
        assert StageFolder(place, "stage").manifest() == manifest


@given(st.data(), IDS)
@settings(max_examples=25, deadline=None)
def test_duplicates_are_exactly_the_ids_of_several_rows(data, ids):
    # One row a block, marked by its place, so that no part replaces another.
    with tempfile.TemporaryDirectory() as place:
        folder = StageFolder(place, "stage")
        folder.begin("k")
        for number, name in enumerate(ids):
            reason = data.draw(st.sampled_from([None, "reason"]))
            table = table_of([{"prompt_id": name, "dropped": reason}, {"prompt_id": f"\0{number}", "dropped": None}])
            folder.write_parts(table, "prompt_id")
        held = Counter([*folder.ids("prompt_id").to_pylist(), *folder.ids("prompt_id", "dropped").to_pylist()])
        several = {name for name, count in held.items() if count > 1}
        assert duplicates(folder, "prompt_id") == several
        if several:
            with pytest.raises(ConservationError, match="duplicate ids"):
                folder.commit(Manifest("stage", "k", {}, {}), "prompt_id")


@given(st.data(), st.sets(TEXT, min_size=1, max_size=10), st.integers(-3, 3).filter(bool))
@settings(max_examples=20, deadline=None)
def test_a_count_that_is_off_is_never_committed(data, ids, off):
    rows, blocks = drawn(data, sorted(ids))
    with tempfile.TemporaryDirectory() as place:
        folder, _ = written(place, blocks)
        with pytest.raises(ConservationError, match="rows in, but"):
            folder.commit(Manifest("stage", "k", {}, {}), "prompt_id", len(rows) + off)
        assert folder.manifest() is None


@given(st.data(), st.sets(TEXT, min_size=1, max_size=10))
@settings(max_examples=20, deadline=None)
def test_a_rewritten_folder_holds_each_row_changed_once(data, ids):
    rows, blocks = drawn(data, sorted(ids))
    losers = data.draw(st.sets(st.sampled_from(sorted(ids))))

    def change(part):
        old = part.to_pylist()
        if not losers & {row["prompt_id"] for row in old}:
            return None
        return pa.Table.from_pylist(
            [{**row, "dropped": "again" if row["prompt_id"] in losers else None} for row in old]
        )

    with tempfile.TemporaryDirectory() as place:
        folder, _ = written(place, blocks)
        folder.rewrite(change, "prompt_id")
        kept = {row["prompt_id"] for row in rows if row["dropped"] is None}
        assert set(folder.ids("prompt_id").to_pylist()) == kept - losers
        assert sorted(folder.done_ids("prompt_id").to_pylist()) == sorted(ids)
        assert folder.reasons().get("again", 0) == len(kept & losers) + sum(row["dropped"] == "again" for row in rows)
