"""Checkpoints of a training run, and the weights that leave it.

A checkpoint holds each worker's shards; Ray Train merges the workers' files into one directory. Each worker adds
the checksums of its files, so that a damaged checkpoint is known and the one before it is taken. A checkpoint
of another number of workers is converted by the engine before it is loaded.
The policy that leaves is safetensors only: the adapter, or the whole model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import CheckpointUploadMode

from rdpo.files.folder import checksum
from rdpo.modeling.weights import WEIGHTS
from rdpo.training.backend import Backend
from rdpo.training.metrics import StepMetrics

EXPORT = "policy"
MERGED = "merged"
HELDOUT_MARGINS = "heldout.jsonl"

SUMS = "checksums-{}.json"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that this number of workers can load; `converted`: another number of workers wrote it."""

    directory: Path
    converted: bool = False


def save_checkpoint(
    engine: Backend, history: list[StepMetrics], leaving: str | None = None, last: bool = False
) -> None:
    """Report a checkpoint of all workers; all but the last one are stored while training goes on.

    Args:
        engine: the trainer's.
        history: the metrics of every step so far; part of the checkpoint, so that none is missing after a restart.
        leaving: these may be the weights that leave training: they are added, with these lines on the held-out pairs.
        last: nothing comes after it, so it is stored at once.
    """
    # One is on its way at most: a store slower than training must not fill this machine's disk.
    ray.train.get_all_reported_checkpoints()
    directory = Path(tempfile.mkdtemp(prefix="rdpo-checkpoint-"))
    try:
        _write(directory, engine, history, leaving)
        ray.train.report(
            history[-1] if history else {},
            checkpoint=ray.train.Checkpoint.from_directory(str(directory)),
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if last else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
    except BaseException:
        # A disk that is full must not be filled by each attempt.
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _write(directory: Path, engine: Backend, history: list[StepMetrics], leaving: str | None) -> None:
    engine.save(directory, {"history": history})
    if leaving is not None:
        export_policy(engine, directory / EXPORT)
        if dist.get_rank() == 0:
            (directory / HELDOUT_MARGINS).write_text(leaving, encoding="utf-8")
    write_checksums(directory)


def write_checksums(directory: Path) -> None:
    """Note the checksums of the files that this worker adds to a checkpoint."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sums = {str(path.relative_to(directory)): _checksum(path) for path in files}
    (directory / SUMS.format(dist.get_rank())).write_text(json.dumps(sums), encoding="utf-8")


def is_whole(directory: Path) -> bool:
    """Whether this worker's share of a checkpoint's files is there as it was written."""
    noted = sorted(directory.glob(SUMS.format("*")))
    try:
        sums = [json.loads(path.read_text(encoding="utf-8")) for path in noted]
        written = {name: expected for one in sums for name, expected in one.items()}
        mine = sorted(written)[dist.get_rank() :: dist.get_world_size()]
        return bool(sums) and all(_checksum(directory / name) == written[name] for name in mine)
    except (OSError, ValueError):
        return False


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return checksum(file)


@contextmanager
def last_checkpoint(backend: type[Backend]) -> Iterator[Saved | None]:
    """The newest whole checkpoint of this run, if there is one; all workers take the same.

    `backend` is the class of the engine that will load it.
    """
    reported = ray.train.get_all_reported_checkpoints() if ray.train.get_checkpoint() else []
    with ExitStack() as opened:
        for one in sorted(reported, key=lambda one: one.metrics.get("step", 0), reverse=True):
            directory = Path(opened.enter_context(one.checkpoint.as_directory()))
            if all(_told_by_all(is_whole(directory))):
                yield opened.enter_context(_fitted(directory, backend))
                return
        yield None


@contextmanager
def _fitted(directory: Path, backend: type[Backend]) -> Iterator[Saved]:
    """A checkpoint as it is, or converted, once on each node, if another number of workers has written it."""
    if backend.fits(directory, dist.get_world_size()):
        yield Saved(directory)
        return

    first = ray.train.get_context().get_local_rank() == 0
    folder = tempfile.mkdtemp(prefix="rdpo-converted-") if first else ""
    node = ray.get_runtime_context().get_node_id()
    own = next(path for path, at in _told_by_all((folder, node)) if path and at == node)
    try:
        if first:
            backend.convert(directory, Path(own))
        # The others must not read it before it is written, nor this one remove it before they have read it.
        dist.barrier()
        yield Saved(Path(own), converted=True)
        dist.barrier()
    finally:
        if first:
            shutil.rmtree(own, ignore_errors=True)


def _told_by_all(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def restore_checkpoint(engine: Backend, saved: Saved | None) -> list[StepMetrics]:
    """Load a checkpoint, if there is one; the metrics of the optimizer steps it has behind it."""
    return list(engine.load(saved.directory)["history"]) if saved else []


def export_policy(engine: Backend, folder: Path) -> None:
    """Gather the trained weights over all workers; rank 0 writes them as safetensors."""
    state = engine.gathered_state()
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        engine.policy.model.save_pretrained(folder, state_dict=state)
    dist.barrier()


def finish_policy(exported: Path, base: Path, merged: Path, trust_remote_code: bool = False) -> None:
    """Make a complete model folder of what training exported, in the precision the base is stored in.

    An adapter is merged, in fp32; the tokenizer's files are added.
    """
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.rmtree(merged, ignore_errors=True)
    adapter = (exported / "adapter_config.json").is_file()
    source = base if adapter else exported
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    if adapter:
        model = PeftModel.from_pretrained(model, str(exported)).merge_and_unload()
    stored = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).dtype or torch.float32
    model.to(stored).save_pretrained(merged)
    for pattern in WEIGHTS[1:]:
        for file in base.glob(pattern):
            if not (merged / file.name).exists() and not file.name.endswith(".index.json"):
                shutil.copy(file, merged / file.name)
