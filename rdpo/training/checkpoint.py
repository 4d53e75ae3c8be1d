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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pyarrow.fs
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import CheckpointUploadMode
from torch import Tensor

from rdpo.errors import InputError
from rdpo.files.folder import checksum
from rdpo.modeling.loading import check_loaded, load_whole, outline
from rdpo.modeling.model import Policy
from rdpo.modeling.probe import own_logps, policy_logps, probe_texts
from rdpo.modeling.saving import copy_companions, copy_weights, save_model
from rdpo.training.backend import Backend
from rdpo.training.fetching import SUMS, Fetch, Files, Place
from rdpo.training.metrics import StepMetrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

EXPORT = "policy"
MERGED = "merged"
HELDOUT_MARGINS = "heldout.jsonl"
ROW_LOSSES = "row_losses.jsonl"
"""Of a job with weights of rows: the loss of each row under the weights that leave training."""

BESIDE = (EXPORT, HELDOUT_MARGINS, ROW_LOSSES)
"""What a checkpoint holds beside the state that training goes on from."""
PROBE_CHUNK = 64
SAME = 1e-3
"""Nats by which the log-prob of a token may differ between what was trained and what leaves."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that this number of workers can load; `converted`: another number of workers wrote it."""

    directory: Path
    converted: bool = False


def save_checkpoint(
    engine: Backend, history: list[StepMetrics], leaving: Mapping[str, str] | None = None, last: bool = False
) -> None:
    """Report a checkpoint of all workers; all but the last one are stored while training runs.

    Args:
        engine: the trainer's.
        history: the metrics of every step so far; part of the checkpoint, so that none is missing after a restart.
        leaving: these may be the weights that leave training: they are added, with these texts by their files' names.
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


def _write(directory: Path, engine: Backend, history: list[StepMetrics], leaving: Mapping[str, str] | None) -> None:
    engine.save(directory, {"history": history})
    if leaving is not None:
        export_policy(engine, directory / EXPORT)
        if dist.get_rank() == 0:
            for name, text in leaving.items():
                (directory / name).write_text(text, encoding="utf-8")
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
        written = dict(chain.from_iterable(one.items() for one in sums))
        # Each worker reads a share of all files, so that the look takes no longer with more workers.
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

    `backend` is the class of the engine that will load it. From a store a node fetches what its workers go on from.
    """
    reported = ray.train.get_all_reported_checkpoints() if ray.train.get_checkpoint() else []
    for one in sorted(reported, key=lambda one: one.metrics.get("step", 0), reverse=True):
        with _opened(one.checkpoint, backend) as saved:
            if saved is not None:
                yield saved
                return
    yield None


@contextmanager
def _opened(checkpoint: ray.train.Checkpoint, backend: type[Backend]) -> Iterator[Saved | None]:
    """A checkpoint that all workers can load; None if it is damaged."""
    stored = not isinstance(checkpoint.filesystem, pyarrow.fs.LocalFileSystem)
    with _shared_folder("rdpo-fetched-") if stored else nullcontext(Path(checkpoint.path)) as directory:
        whole = _fetch(checkpoint, directory, backend) if stored else is_whole(directory)
        # Workers on different steps would wait for each other: one that sees damage has all pass this one over.
        if not all(_of_all_workers(whole)):
            yield None
            return
        with _fitted(directory, backend, fetched=stored) as saved:
            yield saved


def _fetch(checkpoint: ray.train.Checkpoint, folder: Path, backend: type[Backend]) -> bool:
    """Bring what this worker needs of a checkpoint to its node's folder; whether its share is as it was written."""
    place, fetch = _place(), Fetch(checkpoint.filesystem, checkpoint.path, folder)
    try:
        files = Files.read(checkpoint.filesystem, checkpoint.path)
    except (FileNotFoundError, ValueError):
        files = Files({})

    if place.local_rank == 0:
        fetch.outline(files)
    dist.barrier()
    kept = files.needed(place, backend.fits(folder, place.workers), BESIDE)
    return bool(files.by_worker) and fetch.is_whole(files, kept, files.looked_at(place, BESIDE))


def _place() -> Place:
    context = ray.train.get_context()
    return Place(dist.get_rank(), dist.get_world_size(), context.get_local_rank(), context.get_local_world_size())


@contextmanager
def _shared_folder(prefix: str) -> Iterator[Path]:
    """A new folder for the workers of each node, until all of them have left the context."""
    first = ray.train.get_context().get_local_rank() == 0
    folder = tempfile.mkdtemp(prefix=prefix) if first else ""
    node = ray.get_runtime_context().get_node_id()
    own = next(path for path, at in _of_all_workers((folder, node)) if path and at == node)
    try:
        yield Path(own)
        # One must not remove it before the others have read it.
        dist.barrier()
    finally:
        if first:
            shutil.rmtree(own, ignore_errors=True)


@contextmanager
def _fitted(directory: Path, backend: type[Backend], fetched: bool) -> Iterator[Saved]:
    """A checkpoint as it is, or converted, once on each node, if another number of workers has written it.

    What was `fetched` is removed once it is converted: three times a large checkpoint may be more than a disk holds.
    """
    if backend.fits(directory, dist.get_world_size()):
        yield Saved(directory)
        return

    first = ray.train.get_context().get_local_rank() == 0
    with _shared_folder("rdpo-converted-") as own:
        if first:
            backend.convert(directory, own)
            if fetched:
                shutil.rmtree(directory, ignore_errors=True)
        # The others must not read it before it is written.
        dist.barrier()
        yield Saved(own, converted=True)


def _of_all_workers(value: T) -> list[T]:
    # What it is filled with does not matter.
    values = [value] * dist.get_world_size()
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
        save_model(engine.policy.model, folder, state_dict=state)
    dist.barrier()


def finish_policy(exported: Path, base: Path, merged: Path, trust_remote_code: bool = False) -> dict[str, float]:
    """Make a complete model folder of what training exported, in the precision the base is stored in.

    An adapter is merged, in fp32; tokenizer and generation settings are the base's, and so is its code where it is
    trusted. Returned is what was compared: how far log-probs of the merged model are from those of the adapted one, and
    of the model as it is loaded from the folder from those of the one that was saved, in nats a token.

    Raises:
        InputError: they differ; what training exported is left as it is.
    """
    from transformers import AutoConfig

    shutil.rmtree(merged, ignore_errors=True)
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    stored: torch.dtype = config.dtype or torch.float32
    if (exported / "adapter_config.json").is_file():
        found = _finish_adapter(exported, base, merged, stored, trust_remote_code)
    else:
        found = _finish_whole(exported, base, merged, stored, trust_remote_code)
    return found


def _finish_adapter(exported: Path, base: Path, merged: Path, stored: torch.dtype, trust: bool) -> dict[str, float]:
    model, difference = _merged(load_whole(base, torch.float32, trust), exported)
    _say_whether_tied(model)
    _round(model, stored)
    expected = own_logps(model, probe_texts(model))
    save_model(model.to(stored), merged)
    copy_companions(base, merged, code=trust)

    # Let go of before it is loaded again: two whole models may be more than the machine holds.
    del model
    reloaded = _logps_of(merged, torch.float32, stored, trust)
    return {"merge_difference": difference, "reload_difference": _check_reloaded(expected, reloaded, exported)}


def _finish_whole(exported: Path, base: Path, merged: Path, stored: torch.dtype, trust: bool) -> dict[str, float]:
    """Weights that need no merge go from file to file; the models that are compared are mapped from theirs."""
    from transformers import AutoModelForCausalLM

    where = f"model {exported}"
    model, info = outline(where, AutoModelForCausalLM, exported, trust, dtype=stored)
    check_loaded(where, model, info)
    copy_weights(exported, merged, stored)
    _say_whether_tied(model)
    model.config.dtype = stored
    model.config.save_pretrained(merged)
    copy_companions(base, merged, code=trust)

    for dtype in dict.fromkeys((stored, torch.float32)):
        expected, reloaded = (_logps_of(folder, dtype, stored, trust) for folder in (exported, merged))
        # In 16 bits kernels may round otherwise, or overflow: what differs there is looked at in 32.
        if _difference(expected, reloaded) <= SAME:
            break
    return {"reload_difference": _check_reloaded(expected, reloaded, exported)}


def _logps_of(folder: Path, dtype: torch.dtype, stored: torch.dtype, trust: bool) -> Tensor:
    """Log-probs of the probe by a folder's model, computed in `dtype` with the weights that `stored` can hold."""
    model = load_whole(folder, dtype, trust)
    # Weights that are not written to stay mapped from their files, and take no memory of their own.
    if dtype != stored:
        _round(model, stored)
    return own_logps(model, probe_texts(model))


def _check_reloaded(expected: Tensor, reloaded: Tensor, exported: Path) -> float:
    return _check_same(expected, reloaded, exported, "as it is stored", "in memory")


def _merged(model: PreTrainedModel, exported: Path) -> tuple[PreTrainedModel, float]:
    """The model with its adapter merged, and how far its log-probs are from those that training made of the two."""
    from peft import PeftModel

    texts = probe_texts(model)
    adapted = PeftModel.from_pretrained(model, str(exported)).eval()
    trained = policy_logps(Policy(adapted, PROBE_CHUNK, packed=False), texts)
    whole = adapted.merge_and_unload()
    return whole, _check_same(trained, own_logps(whole, texts), exported, "merged", "with its adapter")


def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the tensors that are stored the values that they have in `dtype`; the model still computes in its own.

    `model.to(dtype)` would round rotary frequencies too, which no folder holds and every load computes anew in fp32.
    """
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


def _say_whether_tied(model: PreTrainedModel) -> None:
    """Let the configuration say so where the head has weights of its own: engines go by that, not by the tensors."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        config.tie_word_embeddings = model.config.tie_word_embeddings = False


def _check_same(expected: Tensor, actual: Tensor, exported: Path, one: str, other: str) -> float:
    """The largest difference of two tables of log-probs, which must not be one."""
    difference = _difference(expected, actual)
    # Written this way round, so that a difference that is not a number is refused too.
    if not difference <= SAME:
        raise InputError(
            f"policy: the model {one} has other log-probs than that {other}, by up to {difference:.2g} nats, "
            f"{SAME:g} is allowed, so it is not what was trained; what training left is kept in {exported}"
        )
    return difference


def _difference(expected: Tensor, actual: Tensor) -> float:
    return float((actual - expected).abs().max())
