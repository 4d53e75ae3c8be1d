"""A stage folder whose process dies between any two changes on disk: never committed with what it does not hold."""

import tempfile
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from rdpo.files.folder import MANIFEST
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder

IDS = [f"id-{number}" for number in range(6)]
BLOCKS = st.lists(st.sampled_from(IDS), unique=True, min_size=1).flatmap(
    lambda ids: st.integers(1, len(ids)).map(lambda size: [ids[at : at + size] for at in range(0, len(ids), size)])
)
PATIENT = settings(max_examples=20, deadline=None)


class Killed(BaseException):
    pass


class Dying(LocalFileSystem):
    """A local file system that dies before the change of this number, or half way through a file."""

    def __init__(self, dies_at, **options):
        super().__init__(**options)
        self.left = dies_at

    def change(self):
        self.left -= 1
        if self.left < 0:
            raise Killed

    def open(self, path, mode="rb", **options):
        if "w" in mode:
            try:
                self.change()
            except Killed:
                Path(path).write_bytes(b"half")
                raise
        return super().open(path, mode, **options)

    def mv(self, path1, path2, **options):
        self.change()
        super().mv(path1, path2, **options)

    def rm(self, path, recursive=False, maxdepth=None):
        # One file at a time, the manifest last: nothing says in which order a file system removes them.
        files = sorted(self.find(path), key=lambda name: name.endswith(MANIFEST)) if recursive else [path]
        for file in files:
            self.change()
            super().rm(file)
        if recursive:
            super().rm(path, recursive=True)


def rows_of(ids, key):
    """What the key makes of the ids: one in three is dropped."""
    return [
        {"prompt_id": name, "text": f"{key} of {name}", "dropped": "third" if name[-1] in "03" else None}
        for name in ids
    ]


def make(folder, key, blocks):
    """What the pipeline does with a stage: nothing where it is done, else what is missing."""
    manifest = folder.manifest()
    if manifest and manifest.key == key:
        return
    folder.begin(key)
    done = set(folder.done_ids("prompt_id").to_pylist())
    for block in blocks:
        if missing := [row for row in rows_of(block, key) if row["prompt_id"] not in done]:
            folder.write_parts(pa.Table.from_pylist(missing), "prompt_id")
    folder.commit(Manifest("stage", key, {}, {}), "prompt_id", sum(map(len, blocks)))


def twice(folder, key, blocks):
    """A stage that begins anew each time, and rewrites its parts: as reading prompts does."""
    folder.begin(key)
    folder.clear_parts()
    for block in blocks:
        folder.write_parts(pa.Table.from_pylist(rows_of(block, "raw")), "prompt_id")
    folder.rewrite(lambda part: pa.Table.from_pylist(rows_of(part["prompt_id"].to_pylist(), key)), "prompt_id")
    folder.rewrite(lambda part: None, "prompt_id")
    folder.commit(Manifest("stage", key, {}, {}), "prompt_id", sum(map(len, blocks)))


def held(folder):
    """All rows by id, kept and dropped."""
    tables = [folder.table(), folder.table("dropped")]
    return {row["prompt_id"]: row["text"] for table in tables for row in table.to_pylist()}


def is_true(folder):
    """Whether a folder that is committed holds what its manifest says."""
    manifest = folder.manifest()
    if manifest is None:
        return True
    files = {name: folder._checksum(name) for name in folder._all_files()}
    rows = manifest.rows_out + sum(manifest.dropped.values())
    return files == manifest.files and len(held(folder)) == manifest.rows_in == rows


def killed(folder, dies_at, work):
    """The folder after its process has died in the work, or done it."""
    folder.fs = Dying(dies_at, skip_instance_cache=True)
    with suppress(Killed):
        work(folder)
    return StageFolder(folder.path.rsplit("/", 1)[0], folder.name)


@given(BLOCKS, BLOCKS, st.integers(0, 40), st.sampled_from("ab"))
@PATIENT
def test_whenever_it_dies_the_same_command_ends_with_all_rows(first, second, dies_at, wanted):
    with tempfile.TemporaryDirectory() as place:
        folder = StageFolder(place, "stage")
        make(folder, "a", first)
        folder = killed(folder, dies_at, lambda stage: make(stage, "b", second))
        assert is_true(folder)
        # The next run wants the same, or what was there before.
        blocks = {"a": first, "b": second}[wanted]
        make(folder, wanted, blocks)
        assert is_true(folder)
        assert held(folder) == {name: f"{wanted} of {name}" for block in blocks for name in block}


@given(BLOCKS, st.integers(0, 60))
@PATIENT
def test_parts_that_are_rewritten_are_whole_or_not_committed(blocks, dies_at):
    with tempfile.TemporaryDirectory() as place:
        folder = killed(StageFolder(place, "stage"), dies_at, lambda stage: twice(stage, "b", blocks))
        assert is_true(folder)
        twice(folder, "b", blocks)
        assert is_true(folder)
        assert held(folder).keys() == {name for block in blocks for name in block}
        assert all(row["text"].startswith("b of") for row in folder.table().to_pylist())


@given(BLOCKS, BLOCKS, st.integers(0, 40))
@PATIENT
def test_a_folder_that_takes_over_another_is_committed_last(first, second, dies_at):
    with tempfile.TemporaryDirectory() as place:
        other, own = StageFolder(f"{place}/other", "stage"), StageFolder(f"{place}/own", "stage")
        make(other, "b", second)
        make(own, "a", first)
        own = killed(own, dies_at, lambda stage: stage.take_over(other))
        assert is_true(own)
        make(own, "b", second)
        assert is_true(own)
        assert held(own) == held(other)
        assert is_true(other)


@given(BLOCKS, st.integers(1, 12))
@PATIENT
def test_half_a_file_that_stayed_behind_does_not_change_the_digest(blocks, dies_at):
    with tempfile.TemporaryDirectory() as place:
        whole = StageFolder(f"{place}/whole", "stage")
        make(whole, "a", blocks)
        folder = killed(StageFolder(f"{place}/killed", "stage"), dies_at, lambda stage: make(stage, "a", blocks))
        make(folder, "a", blocks)
        assert folder.manifest().digest == whole.manifest().digest
