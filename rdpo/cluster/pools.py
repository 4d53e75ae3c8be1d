"""Pools of actors: what each actor takes, how rows are mapped by a pool, how it grows and ends.

A pool is declared once. The plan and the check of the cluster read what it takes, and `Pool.map` asks Ray for the same.

A kind of node is named by a custom resource that its nodes declare (`ray start --resources='{"teacher": 1}'`), and
every actor that is meant for it takes a thousandth of that. Ray's node labels would do the same, but Ray Train counts
the workers that there is room for by resources alone, and an autoscaler without label support would start nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rdpo.cluster.traced import traced
from rdpo.config import Concurrency, Engine, largest, smallest

if TYPE_CHECKING:
    import ray.data

    from rdpo.modeling.weights import ModelRef

SHARE = 0.001
"""What an actor takes of its kind. Ray Train divides sums of it with a floor, which not every fraction survives."""
FULL = 1.0
WAITING = 1
"""Blocks that wait in an actor beside those that it works on, so that an engine has no gap between two blocks."""
BLOCK_ROWS = 64
"""Rows that an actor is given at a time, unless its pool says otherwise."""
POOL_ACTORS = ("MapWorker", "Shard")
"""What the classes of a pool's actors begin with: Ray Data's own, and the processes that one of them may lead."""
ENDS_WITHIN_S = 60.0
PAUSE_S = 0.5


@dataclass(frozen=True)
class Held:
    """A model that every actor of a pool holds, as the plan of its memory needs to know it.

    Either an `engine` answers with it, or it reads `tokens` positions in one forward, of which `head_rows` at a time
    have logits (a classifier has none). `dtype` is the precision that the job asks for.
    """

    model: ModelRef
    dtype: str
    tokens: int = 0
    head_rows: int = 0
    engine: Engine | None = None


@dataclass(frozen=True)
class Pool:
    """Actors of one stage that hold a model, as many as `size`, with `cpus` and `gpus` for each, on nodes named so.

    An actor is given `block_rows` rows at a time, and works on `at_once` such blocks at the same time. `environment`
    holds variables of its process. With `shards` above 1 an actor holds no model and takes nothing: it leads so many
    processes, each of which takes `cpus` and `gpus` and holds a part of every weight. `holds`: its models.
    """

    stage: str
    setting: str
    size: Concurrency
    cpus: int
    gpus: float
    nodes: str | None
    block_rows: int = BLOCK_ROWS
    at_once: int = 1
    shards: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    holds: tuple[Held, ...] = ()

    def __str__(self) -> str:
        return f"{self.cpus} CPU, {self.gpus:g} GPU on {self.nodes or 'any node'}"

    @property
    def kind(self) -> dict[str, float] | None:
        """The custom resource that keeps its processes on nodes of their kind; None is anywhere."""
        return share_of(self.nodes)

    @property
    def process(self) -> dict[str, float]:
        """What Ray sets aside for one of its processes."""
        return {"CPU": self.cpus, "GPU": self.gpus, **(self.kind or {})}

    @property
    def processes(self) -> Concurrency:
        """How many processes hold its models, over all its actors."""
        if isinstance(self.size, int):
            return self.size * self.shards
        return self.size[0] * self.shards, self.size[1] * self.shards

    @property
    def rows_at_once(self) -> int:
        """The most rows that its actors have been given at the same time."""
        return largest(self.size) * self.block_rows * (self.at_once + WAITING)

    def map(self, rows: ray.data.Dataset, actor: type, **arguments: Any) -> ray.data.Dataset:
        """Stream rows through the pool.

        Args:
            rows: the rows; they come in blocks of `block_rows` to the actors.
            actor: a class that is called with a block, a pyarrow table, and gives back or yields tables.
            arguments: what its constructor is given.
        """
        from ray.data import ActorPoolStrategy

        # It grows while all its places are taken and shrinks when work runs out.
        strategy = ActorPoolStrategy(
            min_size=smallest(self.size),
            max_size=largest(self.size),
            max_tasks_in_flight_per_actor=self.at_once + WAITING,
            max_concurrent_calls_per_actor=self.at_once,
        )
        leads = self.shards > 1
        actor, arguments = traced(actor, f"{self.stage}, {actor.__name__}", arguments)
        blocks = rows.repartition(target_num_rows_per_block=self.block_rows)
        return blocks.map_batches(
            actor,
            fn_constructor_kwargs=arguments,
            batch_format="pyarrow",
            batch_size=self.block_rows,
            compute=strategy,
            num_cpus=0 if leads else self.cpus,
            num_gpus=0 if leads else self.gpus,
            resources=None if leads else self.kind,
            runtime_env={"env_vars": dict(self.environment)} if self.environment else None,
        )


def engine_pool(stage: str, setting: str, engine: Engine, nodes: str | None, model: ModelRef | None = None) -> Pool:
    """The pool of a section of engines, several blocks at a time in each; on nodes of a kind, or anywhere.

    `model` is what they answer with; a client of a server has none.
    """
    return Pool(
        stage,
        setting,
        engine.concurrency,
        engine.cpus or 1,
        engine.gpus,
        nodes,
        block_rows=engine.rows_in_block,
        at_once=engine.batches_in_flight,
        holds=(Held(model, engine.dtype, engine=engine),) if model else (),
    )


def share_of(nodes: str | None) -> dict[str, float] | None:
    """The custom resource that keeps an actor on nodes of a kind; None is anywhere."""
    return {nodes: SHARE} if nodes else None


def adapt_pools() -> None:
    """Let pools grow as soon as all their places are taken.

    Ray's own threshold is above the share that an actor with one waiting task ever reaches.
    """
    from ray.data import DataContext

    DataContext.get_current().autoscaling_config.actor_pool_util_upscaling_threshold = FULL


def pools_ended(within_s: float = ENDS_WITHIN_S) -> bool:
    """Wait until no actor of this run's pools is left, so that what they held is free; whether that is so.

    A cluster without a dashboard does not say which actors it has; there nothing is waited for.
    """
    import ray
    from ray.util.state import list_actors
    from ray.util.state.exception import RayStateApiException

    context = ray.get_runtime_context()
    mine = [("job_id", "=", context.get_job_id()), ("state", "!=", "DEAD")]
    deadline = time.monotonic() + within_s
    while True:
        try:
            actors = list_actors(address=context.gcs_address, filters=mine)
        except (ConnectionError, RayStateApiException):
            return True
        if not any(actor.class_name.startswith(POOL_ACTORS) for actor in actors):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE_S)
