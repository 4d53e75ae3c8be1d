"""Models that no device holds, read by several processes: the training engine partitions every weight over them.

Each process reads other rows with the same layers at the same time, and gathers the weights of a layer while it is
used (ZeRO-3, arXiv 1910.02054, without an optimizer). An actor of a pool leads them: it plans the forwards, hands out
the shares and notices when a process dies. A process belongs to its leader and ends with it.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from rdpo.cluster.hardware import available_cores, take_device
from rdpo.modeling.packing import plan_step
from rdpo.modeling.readers import FrozenModel, PolicyReader, Reader, forward, put_at, rows_at, sizes_of

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from rdpo.cluster.pools import Pool
    from rdpo.modeling.layout import Tokens
    from rdpo.modeling.probe import ReadAs
    from rdpo.training.backend import Backend

GROUP_TIMEOUT_S = 1800
"""How long a process waits for the others; long enough for the slowest to load its model."""

Share = list[list[list["Tokens"]]]
"""The forwards of one process, in order: of each the prompts, and then every column of answers."""


def open_reader(
    model: FrozenModel, pool: Pool, budget: int, backend: type[Backend], cores: int | None = None
) -> Reader:
    """The reader of one model, see `open_readers`."""
    [reader] = open_readers([model], pool, budget, backend, cores)
    return reader


def open_readers(
    models: Sequence[FrozenModel], pool: Pool, budget: int, backend: type[Backend], cores: int | None = None
) -> list[Reader]:
    """Readers of models in this process, or in the processes that an actor of the pool leads.

    Args:
        models: what is read; all of them are held at the same time.
        pool: what one process takes, and how many processes hold the models.
        budget: most positions of one forward of one process.
        backend: the engine that partitions.
        cores: cores of one process on the CPU; by default its share of this machine's.

    Raises:
        InputError: a model cannot be had, or not be read exactly.
    """
    if pool.shards > 1:
        group = ShardGroup(pool, backend, cores)
        return [group.open(model, budget) for model in models]

    device = take_device(pool.gpus, cores)
    return [PolicyReader(*model.open(device), device, budget) for model in models]


class Site(NamedTuple):
    """Where a process runs, and an address there at which the others can meet it."""

    node: str
    address: str


@dataclass(frozen=True)
class Opened:
    """What a process knows of a model that it has opened."""

    read_as: ReadAs
    vocabulary: int
    positions: int | None


class Shard:
    """A Ray actor that holds a part of every weight of some models."""

    def __init__(self, backend: type[Backend], gpus: float, cores: int):
        self.device = take_device(gpus, cores)
        self.backend, self.engines = backend, dict[int, Any]()

    def site(self) -> Site:
        """Where it runs."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
        return Site(ray.get_runtime_context().get_node_id(), f"{address}:{port}")

    def join(self, rank: int, processes: int, address: str) -> None:
        """Become one of the processes that meet at an address."""
        import torch

        # DeepSpeed reads these, and takes a machine for the place of all processes unless it is told otherwise.
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": "0"}
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address.rsplit(":", 1)
        if self.device == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.distributed.init_process_group(
            "gloo" if self.device == "cpu" else "nccl",
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=processes,
            timeout=timedelta(seconds=GROUP_TIMEOUT_S),
        )

    def open(self, number: int, model: FrozenModel) -> Opened:
        """Load this process's part of a model, which `read` knows by its number."""
        import torch

        from rdpo.modeling.loading import learned_positions

        # Before it is loaded partitioned: merged or converted meanwhile, it would wait for the other processes.
        model.folder()
        engine = self.backend.read_only(model.load, model.forward.dtype, torch.device(self.device))
        self.engines[number] = engine
        policy = engine.policy
        # All processes read the same probe, so they come to the same end.
        return Opened(model.settle(policy), policy.config.vocab_size, learned_positions(policy.causal))

    def read(self, number: int, share: Share) -> list[list[float]]:
        """Summed log-probs of every forward of a share."""
        policy = self.engines[number].policy
        return [forward(policy, policy.batch(*columns).to(self.device)) for columns in share]


class ShardGroup:
    """The processes of one leader."""

    def __init__(self, pool: Pool, backend: type[Backend], cores: int | None = None):
        import ray

        self.opened = 0
        cores = cores or max(1, len(available_cores()) // pool.shards)
        shard = ray.remote(Shard).options(
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            resources=pool.kind,
            runtime_env={"env_vars": dict(pool.environment)} if pool.environment else None,
        )
        found = [shard.remote(backend, pool.gpus, cores) for _ in range(pool.shards)]
        sites = _answers([one.site.remote() for one in found])

        # Neighbours in rank are neighbours on a machine, so that most messages stay there.
        order = sorted(range(len(found)), key=lambda index: sites[index].node)
        self.shards: list[ActorHandle] = [found[index] for index in order]
        meeting = sites[order[0]].address
        self._all([one.join.remote(rank, len(found), meeting) for rank, one in enumerate(self.shards)])

    def open(self, model: FrozenModel, budget: int) -> ShardedReader:
        """Load a model.

        Raises:
            InputError: it cannot be had, or not be read exactly.
        """
        number, self.opened = self.opened, self.opened + 1
        first, *_ = self._all([one.open.remote(number, model) for one in self.shards])
        return ShardedReader(self, number, budget, first)

    def read(self, number: int, shares: Sequence[Share]) -> list[list[list[float]]]:
        """Summed log-probs of every forward of every process."""
        return self._all([one.read.remote(number, share) for one, share in zip(self.shards, shares, strict=True)])

    def _all(self, asked: list[ObjectRef[Any]]) -> list[Any]:
        import ray

        try:
            return _answers(asked)
        except ray.exceptions.RayTaskError as error:
            # The others wait for this process's part and would do so for long.
            for one in self.shards:
                ray.kill(one)
            raise error.cause from None


def _answers(asked: list[ObjectRef[Any]]) -> list[Any]:
    """What processes answer; this process ends if one of them has ended."""
    import ray

    waiting = list(asked)
    try:
        while waiting:
            # One at a time: an error must not wait for processes that wait for the one that failed.
            done, waiting = ray.wait(waiting)
            ray.get(done)
        answers: list[Any] = ray.get(asked)
    except ray.exceptions.RayActorError:
        # Ray takes an actor whose process ends for dead, and makes a new one with new processes, which does its rows
        # again; an exception would end the run.
        os._exit(1)
    return answers


@dataclass(frozen=True)
class ShardedReader:
    """A reader whose model is partitioned over the processes of a group; `budget`: positions of one's forward."""

    group: ShardGroup
    number: int
    budget: int
    opened: Opened

    @property
    def read_as(self) -> ReadAs:
        """The layout in which its log-probs are exact."""
        return self.opened.read_as

    @property
    def vocabulary(self) -> int:
        """How many token ids it has a row for."""
        return self.opened.vocabulary

    @property
    def positions(self) -> int | None:
        """Most tokens that it has positions for."""
        return self.opened.positions

    def __call__(self, prompts: Sequence[Tokens], *answers: Sequence[Tokens]) -> list[list[float]]:
        """Summed completion log-probs in nats, (K, P)."""
        sizes, packed = sizes_of(prompts, *answers), self.read_as.layout == "packed"
        plan = plan_step(range(len(prompts)), sizes, len(self.group.shards), self.budget, packed)
        shares = [[rows_at(micro.pairs, prompts, *answers) for micro in share] for share in plan]

        found = [[math.nan] * len(prompts) for _ in answers]
        for share, logps in zip(plan, self.group.read(self.number, shares), strict=True):
            for micro, values in zip(share, logps, strict=True):
                if not micro.idle:
                    put_at(found, micro.pairs, values)
        return found
