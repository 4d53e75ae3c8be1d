"""A checkpoint comes from a store once a node, and only as far as the node's workers go on from it."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow.fs
import pytest
from fsspec.implementations.local import LocalFileSystem

from rdpo.files.folder import checksum
from rdpo.training import checkpoint
from rdpo.training.fetching import Fetch, Files, Place, parts_of
from tests.support.plain_backend import PlainBackend

SHARD, SHARED, EXPORTED = 1000, 300, 5000
BESIDE = checkpoint.BESIDE


class Store(LocalFileSystem):
    """A store that counts what is read of each file."""

    def __init__(self, **options):
        super().__init__(**options)
        self.read = Counter()

    def open(self, path, mode="rb", **options):
        self.read[Path(path).name] += Path(path).stat().st_size
        return super().open(path, mode, **options)

    @property
    def arrow(self):
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self))


def new_store():
    return Store(skip_instance_cache=True)


def write_checkpoint(folder, workers):
    """One as workers write it: a shard of each, and from the first what all share and the weights that leave."""
    for rank in range(workers):
        sizes = {f"state/shard_{rank}.pt": SHARD}
        if rank == 0:
            sizes |= {"state/shared.pt": SHARED, "policy/model.safetensors": EXPORTED, "heldout.jsonl": 10}
        sums = {}
        for name, size in sizes.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(bytes([rank + 1]) * size)
            with (folder / name).open("rb") as file:
                sums[name] = checksum(file)
        (folder / f"checksums-{rank}.json").write_text(json.dumps(sums))
    return folder


def places(nodes, each):
    return [Place(node * each + local, nodes * each, local, each) for node in range(nodes) for local in range(each)]


def fetched(store, stored, tmp_path, nodes, each, fits=True):
    """What every worker of so many nodes finds, and the folders of the nodes."""
    files, whole = Files.read(store.arrow, str(stored)), []
    folders = [tmp_path / f"node-{node}" for node in range(nodes)]
    for folder in folders:
        Fetch(store.arrow, str(stored), folder).outline(files)
    for place in places(nodes, each):
        fetch = Fetch(store.arrow, str(stored), folders[place.rank // each])
        whole.append(fetch.is_whole(files, files.needed(place, fits, BESIDE), files.looked_at(place, BESIDE)))
    return whole, folders


def held(folder):
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_a_node_holds_its_workers_files_and_what_all_share(tmp_path):
    store, stored = new_store(), write_checkpoint(tmp_path / "stored", 8)
    whole, folders = fetched(store, stored, tmp_path, nodes=2, each=4)
    assert all(whole)
    shards = [{name: size for name, size in held(folder).items() if size} for folder in folders]
    first = {f"state/shard_{rank}.pt": SHARD for rank in range(4)}
    assert shards[0] == {**first, "state/shared.pt": SHARED}
    # The first worker's own shard comes with what it wrote for all: whose is whose only the engine knows.
    assert shards[1] == {f"state/shard_{rank}.pt": SHARD for rank in (0, 4, 5, 6, 7)} | {"state/shared.pt": SHARED}
    # The names of the others are there, for the engine goes by their number.
    assert all(len(list((folder / "state").glob("shard_*"))) == 8 for folder in folders)


def test_what_is_read_in_all_is_little_more_than_the_checkpoint(tmp_path):
    store, stored = new_store(), write_checkpoint(tmp_path / "stored", 32)
    fetched(store, stored, tmp_path, nodes=4, each=8)
    data = {name: amount for name, amount in store.read.items() if not name.startswith("checksums")}
    whole = sum(path.stat().st_size for path in stored.rglob("*.*") if "checksums" not in path.name)
    assert sum(data.values()) == whole + 3 * (SHARD + SHARED)
    # The weights that leave training are read by one worker alone.
    assert data["model.safetensors"] == EXPORTED


def test_another_number_of_workers_brings_each_file_once_to_a_node(tmp_path):
    store, stored = new_store(), write_checkpoint(tmp_path / "stored", 3)
    whole, folders = fetched(store, stored, tmp_path, nodes=2, each=2, fits=False)
    assert all(whole)
    for folder in folders:
        state = {name: size for name, size in held(folder).items() if size}
        assert state == {**{f"state/shard_{rank}.pt": SHARD for rank in range(3)}, "state/shared.pt": SHARED}
    assert store.read["shard_1.pt"] == 2 * SHARD and store.read["model.safetensors"] == EXPORTED


@pytest.mark.parametrize("name", ["state/shard_2.pt", "state/shared.pt", "policy/model.safetensors", "heldout.jsonl"])
@pytest.mark.parametrize("fault", ["damaged", "missing"])
def test_every_file_is_looked_at_by_a_worker(name, fault, tmp_path):
    store, stored = new_store(), write_checkpoint(tmp_path / "stored", 4)
    if fault == "missing":
        (stored / name).unlink()
    else:
        (stored / name).write_bytes(b"damaged")
    whole, _ = fetched(store, stored, tmp_path, nodes=2, each=2)
    assert not all(whole) and any(whole)


def reported(store, folder, step):
    one = SimpleNamespace(filesystem=store.arrow, path=str(folder))
    return SimpleNamespace(checkpoint=one, metrics={"step": step})


def test_the_newest_whole_checkpoint_of_a_store_is_taken_and_removed_again(tmp_path, monkeypatch, process_group):
    store = new_store()
    folders = [write_checkpoint(tmp_path / f"checkpoint_{step}", 1) for step in range(3)]
    (folders[2] / "policy" / "model.safetensors").write_bytes(b"half")
    all_of_them = [reported(store, folder, step) for step, folder in enumerate(folders)]
    context = SimpleNamespace(get_local_rank=lambda: 0, get_local_world_size=lambda: 1, get_node_id=lambda: "here")
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: all_of_them[2])
    monkeypatch.setattr("ray.train.get_all_reported_checkpoints", lambda: all_of_them)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    with checkpoint.last_checkpoint(PlainBackend) as saved:
        assert not saved.converted and saved.directory != folders[1]
        assert (saved.directory / "state/shard_0.pt").read_bytes() == (folders[1] / "state/shard_0.pt").read_bytes()
        # None but the one that is taken fills the disk.
        assert len(list(saved.directory.parent.glob("rdpo-fetched-*"))) == 1
    assert not saved.directory.exists()
    monkeypatch.setattr("ray.train.get_all_reported_checkpoints", lambda: all_of_them[2:])
    with checkpoint.last_checkpoint(PlainBackend) as saved:
        assert saved is None


class Converting(PlainBackend):
    @staticmethod
    def fits(folder, workers):
        return len(list((folder / "state").glob("shard_*"))) == workers

    @staticmethod
    def convert(source, target):
        (target / "whole").write_bytes(b"".join(path.read_bytes() for path in sorted(source.rglob("shard_*"))))


def test_a_checkpoint_that_is_converted_is_not_kept_beside_what_it_becomes(tmp_path, monkeypatch, process_group):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store, stored = new_store(), write_checkpoint(tmp_path / "stored", 3)
    one = reported(store, stored, 0)
    context = SimpleNamespace(get_local_rank=lambda: 0, get_local_world_size=lambda: 1, get_node_id=lambda: "here")
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: one)
    monkeypatch.setattr("ray.train.get_all_reported_checkpoints", lambda: [one])
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    with checkpoint.last_checkpoint(Converting) as saved:
        assert saved.converted and (saved.directory / "whole").stat().st_size == 3 * SHARD
        assert not list(tmp_path.glob("rdpo-fetched-*"))
    assert not list(tmp_path.glob("rdpo-*"))
    assert (stored / "state/shard_1.pt").is_file()


def test_of_a_checkpoint_in_a_store_only_what_leaves_is_fetched(tmp_path):
    source, store = write_checkpoint(tmp_path, 4), new_store()
    with parts_of(store.arrow, str(source), (checkpoint.EXPORT, checkpoint.HELDOUT_MARGINS)) as folder:
        found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {name: (source / name).read_bytes() for name in ("policy/model.safetensors", "heldout.jsonl")}
    assert sum(store.read.values()) == EXPORTED + 10
    assert not folder.exists()


def test_a_checkpoint_on_this_machine_is_taken_where_it_is(tmp_path):
    with parts_of(pyarrow.fs.LocalFileSystem(), str(tmp_path), BESIDE) as folder:
        assert folder == tmp_path
