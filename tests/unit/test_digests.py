"""Hashes of large files are kept from one command to the next, and never outlive the content."""

import os
import shutil

import pytest

from rdpo.files import digests
from rdpo.files.digests import SMALL_BYTES, file_digest


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """The files that were read, in a cache of their own; `reads.clear()` begins another command."""
    monkeypatch.setenv("RDPO_CACHE", str(tmp_path / "cache"))
    found = []
    read = digests._read
    monkeypatch.setattr(digests, "_read", lambda path: found.append(path) or read(path))
    return found


def next_command(reads):
    digests._digest.cache_clear()
    reads.clear()


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"a" * (SMALL_BYTES + 1))
    return path


def test_a_large_file_is_read_once(large, reads):
    first = file_digest(large)
    assert reads == [str(large)]
    next_command(reads)
    assert file_digest(large) == first and reads == []


def test_other_content_is_read_again_also_of_the_same_size_and_time(large, reads, tmp_path):
    before, stat = file_digest(large), large.stat()
    next_command(reads)
    other = tmp_path / "other"
    other.write_bytes(b"b" * (SMALL_BYTES + 1))
    shutil.copyfile(other, large)
    os.utime(large, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert large.stat().st_mtime_ns == stat.st_mtime_ns
    assert file_digest(large) != before and reads == [str(large)]


def test_a_cache_that_cannot_be_used_costs_time_alone(large, reads, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    first = file_digest(large)
    next_command(reads)
    assert file_digest(large) == first and reads == [str(large)]
