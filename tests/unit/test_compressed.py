"""Compressed files are unpacked as they are read, and one that is cut off or is something else is refused."""

import gzip

import pyarrow as pa
import pytest

from rdpo.errors import InputError
from rdpo.files.compressed import ENDINGS, open_unpacked, plain_name

LINES = b"".join(b'{"prompt": "question %d"}\n' % number for number in range(20_000))


def packed(content, ending):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, ENDINGS[ending]) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def content_of(path):
    with open_unpacked(str(path)) as file:
        return file.read()


@pytest.fixture(params=sorted(ENDINGS))
def path(request, tmp_path):
    return tmp_path / f"rows.jsonl{request.param}"


def test_a_compressed_file_is_read_as_what_it_holds(path):
    path.write_bytes(packed(LINES, path.suffix))
    assert path.stat().st_size < len(LINES)
    with open_unpacked(str(path)) as file:
        assert file.readline() == b'{"prompt": "question 0"}\n'
        assert file.read() == LINES.split(b"\n", 1)[1]


def test_files_packed_one_after_the_other_are_one(path):
    path.write_bytes(packed(b"a\n", path.suffix) + packed(LINES, path.suffix))
    assert content_of(path) == b"a\n" + LINES


def test_only_what_is_asked_for_is_unpacked(path):
    zeros = packed(bytes(1 << 24), path.suffix)
    path.write_bytes(zeros * 64)
    before = pa.total_allocated_bytes()
    with open_unpacked(str(path)) as file:
        assert file.read(10) == bytes(10)
        assert pa.total_allocated_bytes() - before < 1 << 24


@pytest.mark.parametrize("kept", [1, 5, 100, 5_000, -1, -4, -9])
def test_a_file_that_is_cut_off_is_refused(path, kept):
    path.write_bytes(packed(LINES, path.suffix)[:kept])
    with pytest.raises(InputError, match="cut off or damaged, or is not what the ending of its name says") as refused:
        content_of(path)
    assert path.name in str(refused.value) and "copy it again" in str(refused.value)


@pytest.mark.parametrize("content", [b'{"prompt": "plain"}\n', b"\x00", b"PK\x03\x04zip"])
def test_a_file_that_is_something_else_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(InputError, match=path.name):
        content_of(path)
    path.write_bytes(packed(LINES, ".zst" if path.suffix == ".gz" else ".gz"))
    with pytest.raises(InputError, match=path.name):
        content_of(path)


def test_a_changed_byte_is_found_by_the_checksum(tmp_path):
    content = bytearray(gzip.compress(LINES))
    content[-6] ^= 1
    (tmp_path / "rows.jsonl.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"rows\.jsonl\.gz"):
        content_of(tmp_path / "rows.jsonl.gz")


def test_an_error_of_the_disk_or_the_store_stays_one(path, monkeypatch):
    class Failing:
        closed = False

        def read(self, size=-1):
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")

        def close(self):
            pass

    monkeypatch.setattr("rdpo.files.compressed.open_file", lambda address: Failing())
    with pytest.raises(OSError, match="AWS Error NETWORK_CONNECTION"):
        content_of(path)


def test_the_name_below_the_compression():
    assert [plain_name(name) for name in ("a.jsonl.gz", "b.csv.zst", "c.json", "d.gz.parquet")] == [
        "a.jsonl",
        "b.csv",
        "c.json",
        "d.gz.parquet",
    ]
