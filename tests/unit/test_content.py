"""Hashes of columns: they tell content apart, and nothing else."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rdpo.files.content import column_digests, column_sums
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder

TURNS = [[{"role": "user", "content": text}] for text in "kl"]
ROWS = [
    {"prompt_id": "a", "text": "x", "n": 1, "scores": {"r": 1.0}, "ids": [1, 2], "turns": TURNS[0]},
    {"prompt_id": "b", "text": "", "n": 2, "scores": {"r": 2.0}, "ids": [], "turns": TURNS[1]},
    {"prompt_id": "c", "text": None, "n": None, "scores": None, "ids": None, "turns": []},
]


def digests(*parts):
    return column_digests(column_sums(pa.Table.from_pylist(part), "prompt_id") for part in parts)


def changed(**values):
    """The columns whose hash is another one once the first row has these values."""
    whole, other = digests(ROWS), digests([{**ROWS[0], **values}, *ROWS[1:]])
    return {name for name in whole if whole[name] != other.get(name)}


def test_neither_order_nor_division_of_rows_counts():
    assert digests(ROWS) == digests(ROWS[::-1]) == digests([ROWS[2]], [ROWS[0]], [ROWS[1]])


@pytest.mark.parametrize(
    "values",
    [
        {"text": "y"},
        {"text": None},
        {"n": 2},
        {"scores": {"r": 1.5}},
        {"scores": None},
        {"ids": [2, 1]},
        {"ids": [1, 2, 0]},
        {"turns": [{"role": "user", "content": "m"}]},
        {"turns": []},
    ],
)
def test_another_value_is_another_hash_of_its_column_alone(values):
    assert changed(**values) == set(values)


def test_values_of_two_rows_that_change_places_are_another_content():
    swapped = [{**ROWS[0], "n": 2}, {**ROWS[1], "n": 1}, ROWS[2]]
    assert digests(swapped)["n"] != digests(ROWS)["n"]


def test_text_and_list_are_known_by_their_ends():
    """What stands at the end of one value and at the beginning of the next are two things."""
    one = [{"prompt_id": "a", "text": "ab", "ids": [1, 2]}, {"prompt_id": "b", "text": "c", "ids": [3]}]
    other = [{"prompt_id": "a", "text": "a", "ids": [1]}, {"prompt_id": "b", "text": "bc", "ids": [2, 3]}]
    assert all(digests(one)[name] != digests(other)[name] for name in ("text", "ids"))


def test_types_that_a_part_has_by_chance_do_not_count():
    """A part of whole numbers has integers; one without a field of a table has it not at all, or as null."""
    together = [{"prompt_id": "a", "n": 1.0, "scores": {"r": 1.0, "s": None}}, {"prompt_id": "b", "n": 0.5}]
    apart = [{"prompt_id": "a", "n": 1, "scores": {"r": 1.0}}], [{"prompt_id": "b", "n": 0.5, "scores": None}]
    assert digests(together) == digests(*apart)


def test_large_whole_numbers_are_told_apart():
    one, other = ([{"prompt_id": "a", "n": (1 << 60) + k}] for k in (0, 1))
    assert digests(one) != digests(other)


def test_a_manifest_has_the_hashes_of_all_parts_and_of_such_as_carry_none(tmp_path):
    folders = [StageFolder(str(tmp_path / name), "stage") for name in ("new", "old")]
    for folder in folders:
        folder.begin("k")
        folder.write_parts(pa.Table.from_pylist(ROWS[:2]), "prompt_id")
        folder.write_parts(pa.Table.from_pylist(ROWS[2:], schema=pa.Table.from_pylist(ROWS).schema), "prompt_id")
    for name in folders[1].parts():
        place = folders[1].address(name)
        pq.write_table(pq.read_table(place).replace_schema_metadata(None), place)
    committed = [folder.commit(Manifest("stage", "k", {}, {}), "prompt_id") for folder in folders]
    assert committed[0].columns == committed[1].columns == digests(ROWS)
