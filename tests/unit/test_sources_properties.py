"""Any bytes in a source: each line is a row or a reason, in its place, and can be stored; or the file is refused."""

import json
import tempfile
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rdpo.errors import InputError
from rdpo.records import clean
from rdpo.synthesis import formats, sources
from rdpo.synthesis.conversation import Unusable, derive_pair, read_prompt
from rdpo.synthesis.given import answered
from rdpo.synthesis.prompts import with_system
from rdpo.synthesis.sources import _raw_table, read_rows

QUICK = settings(max_examples=100, deadline=None)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
LINES = st.one_of(
    st.binary(max_size=40),
    st.dictionaries(st.text(max_size=8), VALUES, max_size=4).map(lambda row: json.dumps(row).encode()),
    VALUES.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
).map(lambda line: line.replace(b"\n", b" "))


def rows_of(content, suffix):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"source{suffix}"
        path.write_bytes(content)
        return list(read_rows(str(path)))


@given(st.lists(LINES, max_size=8))
@QUICK
def test_every_line_of_json_is_a_row_or_a_reason_under_its_number(lines):
    rows = rows_of(b"\n".join(lines), ".jsonl")
    assert [number for number, _ in rows] == [place for place, line in enumerate(lines, 1) if line.strip()]
    table = _raw_table("source", rows).to_pylist()
    for (_, raw), stored in zip(rows, table, strict=True):
        # Not by equality of values: NaN.
        back = stored["problem"] or json.dumps(json.loads(stored["raw"]))
        assert back == (raw if isinstance(raw, str) else json.dumps(raw))


@pytest.mark.parametrize("shape", [b'{"a":' * 5 + b"%s" + b"}" * 5, b'{"prompt": %s}'])
def test_no_depth_of_nesting_can_be_read_but_not_written(shape):
    for depth in [*range(80, 120), *range(900, 1000, 3), 100_000]:
        ((_, raw),) = rows_of(shape % (b"[" * depth + b"]" * depth), ".jsonl")
        _raw_table("source", [(1, raw)])
        assert isinstance(raw, str) == (depth + shape.count(b"{") > formats.NESTED)


@given(st.binary(max_size=200) | st.text('a,"\r\n\ufeff\x00é', max_size=60).map(str.encode))
@example(b"a\n" + b"x" * 200_000)
@example(b'prompt\n"' + b"y\n" * 100_000)
@QUICK
def test_a_csv_file_is_rows_or_one_message(content):
    try:
        rows = rows_of(content, ".csv")
    except InputError as refusal:
        assert "source.csv" in str(refusal) and "line" in str(refusal)
    else:
        assert _raw_table("source", rows).num_rows == len(rows)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_of_any_system(ending, mark):
    content = mark + ending.join(["prompt,split", '"a, ""b""",train', "c,heldout"]) + ending
    rows = rows_of(content.encode(), ".csv")
    assert [row["prompt"] for _, row in rows] == ['a, "b"', "c"]


def test_a_line_without_end_is_a_reason_and_the_next_is_read(monkeypatch):
    monkeypatch.setattr(formats, "LINE_BYTES", 1 << 20)
    lines = [b'{"prompt": "' + b"x" * length + b'"}' for length in (10, 5 << 20, (1 << 20) - 15, (1 << 20) - 14, 10)]
    rows = rows_of(b"\n".join(lines), ".jsonl")
    too_long = [isinstance(row, str) for _, row in rows]
    assert too_long == [False, True, False, True, False]
    assert rows[1][1] == "line is longer than 1 MiB"
    with pytest.raises(InputError, match="line 2 is longer than 1 MiB"):
        rows_of(b"prompt\n" + b"x" * (5 << 20), ".csv")


def test_rows_are_cut_into_tables_by_size_too(monkeypatch):
    monkeypatch.setattr(sources, "READ_CHARS", 100)
    numbered = [(number, {"prompt": "x" * 60} if number % 2 else "a reason") for number in range(20)]
    chunks = list(sources._chunks(numbered))
    assert list(chain(*chunks)) == numbered
    assert max(len(chunk) for chunk in chunks) <= 4


@given(st.integers(0, 4000), st.integers(0, 255))
@example(751, 128)
@QUICK
def test_a_parquet_file_with_any_byte_changed_is_rows_or_one_message(place, byte):
    table = pa.table({"prompt": [f"question {index}" for index in range(50)], "n": range(50)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content = bytearray(sink.getvalue().to_pybytes())
    content[place % len(content)] = byte
    try:
        rows = rows_of(bytes(content), ".parquet")
    except InputError as refusal:
        assert "source.parquet is not a readable Parquet file" in str(refusal) or "row group" in str(refusal)
    else:
        assert [number for number, _ in rows] == list(range(1, len(rows) + 1))
        _raw_table("source", rows)


def test_a_parquet_row_that_is_no_text_is_a_reason_and_the_others_are_read(tmp_path):
    broken = pa.StringArray.from_buffers(
        3, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0\6\0\0\0"), pa.py_buffer(b"ok\xff\xfeno")
    )
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "x.parquet")
    rows = list(read_rows(str(tmp_path / "x.parquet")))
    assert [number for number, _ in rows] == [1, 2, 3]
    assert [row["prompt"] for _, row in rows[::2]] == ["ok", "no"]
    assert rows[1][1].startswith("row cannot be read: ")


def test_a_parquet_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    pq.write_table(pa.table({"prompt": ["x" * 1_000_000] * 20}), tmp_path / "x.parquet", use_dictionary=False)
    assert (tmp_path / "x.parquet").stat().st_size < 2_000_000
    assert len(list(read_rows(str(tmp_path / "x.parquet")))) == 20
    monkeypatch.setattr(formats, "ROW_GROUP_BYTES", 10_000_000)
    with pytest.raises(InputError, match="unpacks to"):
        list(read_rows(str(tmp_path / "x.parquet")))


@given(
    VALUES | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": VALUES}))
)
@QUICK
def test_messages_are_whole_or_refused_with_a_reason(value):
    try:
        messages = with_system(read_prompt(value), "system words")
    except Unusable as reason:
        assert str(reason)
        return
    for message in messages:
        assert message["role"] == "system" or message["content"].strip()
        assert clean(message["content"]) == message["content"]
    assert messages[0]["role"] == "system" and messages[-1]["role"] != "assistant"


@given(st.dictionaries(st.sampled_from(["chosen", "rejected", "score_chosen", "score_rejected"]), VALUES))
@QUICK
def test_a_given_pair_is_whole_or_dropped_with_a_reason(columns):
    try:
        pair = derive_pair({"prompt": "q", **columns}, "prompt")
    except Unusable as reason:
        assert str(reason)
        return
    row = answered({"prompt_id": "a", "extra": json.dumps({**columns, **pair.answers})})
    assert row["dropped"] or (row["chosen"].strip() and row["rejected"].strip())
    pa.Table.from_pylist([row])
