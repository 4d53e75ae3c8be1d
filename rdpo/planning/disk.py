"""Disk that a job's training and its models take, by where it lies: the run directory, and each node.

Counted from the numbers of weights, as memory is. Rows are small beside it, and what the hub's cache holds of other
models is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from rdpo.cluster.gpus import PER_NODE
from rdpo.config import Job, smallest
from rdpo.modeling.student import student_dtype
from rdpo.modeling.weights import ModelRef
from rdpo.planning.memory import GIB, Rehearsal
from rdpo.tracking.tables import aligned
from rdpo.training.backend import Weights, backend_of

CONVERTED = 3
"""A checkpoint that another number of workers goes on from: itself, its slices, and what they are put together to."""


def checkpoint_bytes(job: Job, rehearsal: Rehearsal) -> int:
    """Bytes of one checkpoint of all workers: the optimizer's state and the weights that are trained.

    Frozen weights are left out. Where weights are partitioned only their float32 copies are stored.
    """
    trained = rehearsal.trained
    # As if one worker had all of it, on its own device.
    alone = job.training.model_copy(update={"num_workers": 1, "offload": "none"})
    whole = job.model_copy(update={"training": alone})
    parts = backend_of(job).memory_parts(whole, Weights(rehearsal.weights, trained, 0))
    partitioned = backend_of(job).elements_sent(job, rehearsal.weights, trained) > 0
    copies = 0 if partitioned else trained * getattr(torch, student_dtype(job)).itemsize
    return parts.get("master weights", 0) + parts["optimizer state"] + copies


def run_dir_parts(job: Job, rehearsal: Rehearsal) -> dict[str, int]:
    """Bytes in the run directory by part, when most of them are there: at the end."""
    training, merged = job.training, _whole_model(job, rehearsal)
    left = rehearsal.trained * getattr(torch, student_dtype(job)).itemsize
    one, kept = checkpoint_bytes(job, rehearsal), training.keep_checkpoints + 1
    # Only the weights of a checkpoint that may leave training are beside it.
    candidates = kept if training.select == "best" else 1

    adapter = job.trains_adapter and (job.student.adapter is None or job.student.continues)
    published = (merged if job.publish.merge or not adapter else 0) + (left if adapter else 0)
    # Each step keeps its trainings for the types of annotators, and the last one's policies are published.
    types = job.annotators if job.fits_types else None
    trainings, models = (types.trainings, types.types) if types else (1, 1)
    return {
        f"checkpoints, {trainings * kept} of {one / GIB:,.2f}": trainings * kept * one,
        "weights that leave training": trainings * (candidates + 1 + bool(training.extrapolation)) * left,
        "policy, whole": models * merged,
        "published model": models * published,
    }


def node_parts(job: Job, rehearsal: Rehearsal, gpus: bool) -> dict[str, int]:
    """Bytes on the disk of each node that trains, where its temporary files and the hub's cache lie."""
    one, nodes = checkpoint_bytes(job, rehearsal), nodes_of(job, gpus)
    start = {"start model": _whole_model(job, rehearsal)}
    if job.student.adapter:
        start["start model, its adapter merged into it"] = start["start model"]
    return {
        **start,
        "a checkpoint on its way to the run directory": math.ceil(one / nodes),
        "or to go on with another number of workers": CONVERTED * one,
    }


def nodes_of(job: Job, gpus: bool) -> int:
    """Nodes of eight GPUs that the training workers fill; one without GPUs."""
    return math.ceil(smallest(job.training.num_workers) / PER_NODE) if gpus else 1


def _whole_model(job: Job, rehearsal: Rehearsal) -> int:
    """Bytes of the student as its start model is stored."""
    added = rehearsal.trained if job.trains_adapter else 0
    stored = ModelRef.student(job).config().dtype or torch.float32
    return (rehearsal.weights - added) * int(stored.itemsize)


def disk(job: Job, rehearsal: Rehearsal, gpus: bool) -> Iterator[str]:
    """Lines that say how much disk is taken, and where."""
    nodes = nodes_of(job, gpus)
    run_dir, node = run_dir_parts(job, rehearsal), node_parts(job, rehearsal, gpus)
    cells = [["GiB of disk", ""], *_cells("run directory", run_dir), ["  total", f"{sum(run_dir.values()) / GIB:,.2f}"]]
    cells += _cells(f"each of {nodes} nodes" if nodes > 1 else "the node that trains", node)
    # Of the two last, one at a time.
    most = sum(node.values()) - min(list(node.values())[-2:])
    cells.append(["  at most", f"{most / GIB:,.2f}"])
    yield from aligned(cells, right=[1])
    if job.rounds.count > 1:
        yield f"in one round of {job.rounds.count}"
    if job.fits_types and job.annotators:
        yield job.annotators.work


def _cells(title: str, parts: dict[str, int]) -> list[list[str]]:
    return [[f" {title}", ""], *([f"  {name}", f"{amount / GIB:,.2f}"] for name, amount in parts.items() if amount)]
