"""How long a job's stages take and what that costs, from rates and prices that are given; nothing is guessed.

Rates come from a finished run of the same job with fewer prompts, or from a file: rows a second of one actor, by
stage. A stage takes its rows over the rate times its actors; it costs its nodes for that time, or for the whole run
where they are reserved.
"""

from __future__ import annotations

import calendar
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from rdpo.cluster.pools import Pool
from rdpo.config import Job, Section, Training, explained, largest, read_tables
from rdpo.errors import InputError
from rdpo.execution.reader import RunReader
from rdpo.files.folder import IN_PROGRESS
from rdpo.files.manifest import Manifest
from rdpo.stages.pools import pools_of
from rdpo.tracking.tables import aligned

STAGES = ("made", "synthesis", "screening", "rewards", "reference", "training", "evaluation")
ANYWHERE = "anywhere"
SLACK_S = 10.0


class Price(Section):
    """What a kind of node costs, in dollars: an hour of one of its GPUs, or of a node with so many GPUs and CPUs."""

    per_gpu_hour: float | None = Field(default=None, ge=0)
    per_node_hour: float | None = Field(default=None, ge=0)
    gpus: int = Field(default=0, ge=0)
    cpus: int = Field(default=0, ge=0)
    reserved: bool = False
    """Its nodes are paid for from the first stage to the last, as those are that do not scale down."""

    @model_validator(mode="after")
    def _check_one(self) -> Price:
        if (self.per_gpu_hour is None) == (self.per_node_hour is None):
            raise ValueError("give per_gpu_hour, or per_node_hour with the node's gpus and cpus")
        if self.per_node_hour is not None and not self.cpus:
            raise ValueError("per_node_hour needs the node's cpus, and its gpus if it has any")
        return self

    def an_hour(self, pool: Pool) -> float:
        """Dollars an hour of all actors of a pool, rounded up to whole GPUs or nodes.

        Raises:
            InputError: no actor fits on such a node, or the actors have no GPU that could be paid for.
        """
        if self.per_gpu_hour is not None:
            if not pool.gpus:
                raise InputError(f"--prices: {pool.setting} is on the CPU; price {_kind(pool)} by per_node_hour")
            return math.ceil(largest(pool.processes) * pool.gpus) * self.per_gpu_hour
        if self.per_node_hour is None:
            raise ValueError("a price has per_gpu_hour or per_node_hour")

        places = [self.cpus // pool.cpus] + ([math.floor(self.gpus / pool.gpus)] if pool.gpus else [])
        if not min(places):
            raise InputError(
                f"--prices: no actor of {pool.setting} fits on a node of {_kind(pool)} with these GPUs, CPUs"
            )
        return math.ceil(largest(pool.processes) / min(places)) * self.per_node_hour


def _kind(pool: Pool) -> str:
    return pool.nodes or ANYWHERE


def load_prices(path: str) -> dict[str, Price]:
    """Prices by kind of node; `anywhere` is for pools without one.

    Raises:
        InputError: the file is missing or wrong.
    """
    try:
        return TypeAdapter(dict[str, Price]).validate_python(read_tables(path))
    except ValidationError as error:
        raise InputError(explained(path, error)) from None


@dataclass(frozen=True)
class Rates:
    """Rows a second by stage with so many actors of each pool (`actors`: number and GPUs; without it one of each)."""

    source: str
    rows_per_second: Mapping[str, float]
    actors: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    rows_per_prompt: Mapping[str, float] = field(default_factory=dict)
    together: bool = False

    def speedup(self, pool: Pool) -> float:
        """How many times as fast the pool is as what was measured.

        Raises:
            InputError: no such pool was measured.
        """
        known = self.actors.get(pool.setting) if self.actors else (1, pool.gpus)
        if known is None or known[1] != pool.gpus:
            had = "no such pool" if known is None else f"{known[1]:g} GPU(s) for each of its actors"
            raise InputError(f"--rates {self.source}: {pool.setting} has {pool.gpus:g} GPU(s), there it is {had}")
        return largest(pool.processes) / known[0]


def load_rates(source: str) -> Rates:
    """Rates from the directory of a finished run, or from a TOML file.

    Raises:
        InputError: it is missing, wrong, unfinished, or was interrupted.
    """
    return _rates_of_file(source) if source.endswith(".toml") else _rates_of_run(source)


def _rates_of_file(path: str) -> Rates:
    try:
        rates = TypeAdapter(dict[str, Annotated[float, Field(gt=0)]]).validate_python(read_tables(path))
    except ValidationError as error:
        raise InputError(explained(path, error)) from None
    if unknown := sorted(set(rates) - set(STAGES)):
        raise InputError(f"{path}: {', '.join(unknown)}: no such stage; there are {', '.join(STAGES)}")
    return Rates(path, rates)


def _rates_of_run(run_dir: str) -> Rates:
    run = RunReader(run_dir)
    job, pools = run.job, pools_of(run.job)
    # Synthesis always: all other stages' rows are counted for each of its prompts.
    stages = dict.fromkeys(["synthesis", *(pool.stage for pool in pools)])
    manifests = {stage: _uninterrupted(run, stage) for stage in stages}
    prompts = manifests["synthesis"].rows_in
    done: dict[str, float] = {stage: manifest.rows_in for stage, manifest in manifests.items()}
    pairs = manifests["training"].summary["pairs"] if "training" in manifests else 0
    if pairs:
        done["training"] = trained_rows(pairs, job.training)

    return Rates(
        run_dir,
        {stage: done[stage] / manifest.seconds for stage, manifest in manifests.items() if manifest.seconds},
        {pool.setting: (largest(pool.processes), pool.gpus) for pool in pools},
        {stage: (pairs if stage == "training" else done[stage]) / prompts for stage in manifests} if prompts else {},
        "rewards" in manifests["synthesis"].together,
    )


def _uninterrupted(run: RunReader, stage: str) -> Manifest:
    """The manifest of a stage whose seconds are those of all its rows."""
    folder = run.folder(stage)
    manifest = folder.manifest()
    if manifest is None:
        raise InputError(f"--rates {run.dir}: its {stage} stage is not finished")
    began = (folder.read_json(IN_PROGRESS) or {}).get("began")
    # `seconds` are those of the last attempt alone: an earlier one shows in when the folder was begun.
    ended = calendar.timegm(time.strptime(manifest.created, "%Y-%m-%dT%H:%M:%SZ"))
    if began and ended - began > manifest.seconds + SLACK_S:
        raise InputError(f"--rates {run.dir}: its {stage} stage was interrupted, so its rate is not known")
    return manifest


def trained_rows(pairs: float, training: Training) -> float:
    """Pairs that training goes through, each as often as it comes up."""
    rows = pairs * training.epochs
    return rows if training.max_steps is None else min(rows, training.max_steps * training.batch_size)


@dataclass(frozen=True)
class StageCost:
    """Rows, hours and dollars of one stage; nodes that are reserved are not in them."""

    stage: str
    rows: float
    hours: float
    dollars: float


def stage_costs(job: Job, prompts: int, rates: Rates, prices: Mapping[str, Price]) -> list[StageCost]:
    """What each stage with a pool takes.

    Raises:
        InputError: a rate or a price is not known.
    """
    pools = pools_of(job)
    for pool in pools:
        if prices and _kind(pool) not in prices:
            raise InputError(f"--prices: none for {_kind(pool)}, where {pool.setting} runs; add a table of that name")

    costs = []
    for stage in dict.fromkeys(pool.stage for pool in pools):
        if stage not in rates.rows_per_second:
            raise InputError(f"--rates {rates.source}: nothing for {stage}; add its rows a second of one actor")

        own = [pool for pool in pools if pool.stage == stage]
        rows = _rows(job, stage, prompts, rates)
        # A stage with several pools runs as fast as the slowest of them.
        hours = rows / rates.rows_per_second[stage] / min(map(rates.speedup, own)) / 3600
        paid = [prices[_kind(pool)].an_hour(pool) for pool in own if prices and not prices[_kind(pool)].reserved]
        costs.append(StageCost(stage, rows, hours, hours * sum(paid)))
    return costs


def _rows(job: Job, stage: str, prompts: int, rates: Rates) -> float:
    if stage == "made" and job.prompts.made:
        return job.prompts.made.count
    types = job.annotators if job.fits_types else None
    rows = prompts * rates.rows_per_prompt.get(stage, 1.0)
    if stage == "training":
        return trained_rows(rows, job.training) * (types.trainings if types else 1)
    if stage == "evaluation":
        return min(rows, job.evaluation.limit or rows) * (types.types if types else 1)
    return rows


def reserved_dollars(job: Job, hours: float, prices: Mapping[str, Price]) -> dict[str, float]:
    """What the nodes that are paid for all the time cost, by kind: as many as the largest of its pools takes."""
    an_hour: dict[str, float] = {}
    for pool in pools_of(job):
        if prices and prices[_kind(pool)].reserved:
            an_hour[_kind(pool)] = max(an_hour.get(_kind(pool), 0.0), prices[_kind(pool)].an_hour(pool))
    return {kind: dollars * hours for kind, dollars in an_hour.items()}


def cost_table(job: Job, prompts: int | None, rates: Rates, prices: Mapping[str, Price]) -> Iterator[str]:
    """Hours, and dollars where there are prices, by stage and in all, and what is assumed; as lines of text.

    Raises:
        InputError: a rate, a price or the number of prompts is not known.
    """
    prompts = prompts or job.synthesis.limit
    if not prompts:
        raise InputError("--rates: how many prompts? give --prompts, or synthesis.limit in the job")

    costs = stage_costs(job, prompts, rates, prices)
    # Stages that stream as one execution take as long as the longer of them.
    both = [cost.hours for cost in costs if cost.stage in ("synthesis", "rewards")]
    hours = sum(cost.hours for cost in costs) - (min(both) if rates.together and len(both) > 1 else 0.0)
    reserved = reserved_dollars(job, hours, prices)
    total = sum(cost.dollars for cost in costs) + sum(reserved.values())

    cells = [["stage", "rows", "hours", "dollars"]]
    cells += [[cost.stage, f"{cost.rows:,.0f}", f"{cost.hours:,.2f}", f"{cost.dollars:,.2f}"] for cost in costs]
    cells += [[f"{kind}, reserved", "", f"{hours:,.2f}", f"{dollars:,.2f}"] for kind, dollars in reserved.items()]
    cells.append(["in all", "", f"{hours:,.2f}", f"{total:,.2f}"])
    yield from aligned(cells if prices else [row[:-1] for row in cells], right=[1, 2, 3])
    yield from _assumed(job, prompts, rates, bool(prices))


def _assumed(job: Job, prompts: int, rates: Rates, priced: bool) -> Iterator[str]:
    yield f"assumed: {prompts:,} prompts; rates of {rates.source} times the number of actors, pools at their largest;"
    kept = "as many rows of each prompt as there" if rates.rows_per_prompt else "no row is dropped"
    yield f"  the same models, lengths and machines; {kept}; the start of models in proportion to the rows"
    yield "  not counted: the stages without a model, waiting for nodes, interruptions, storage and traffic"
    if priced:
        yield "  nodes are paid for in their stages' hours, reserved ones in all; the head is not counted"
    if job.rounds.count > 1:
        yield f"  one round of {job.rounds.count}"
    if job.fits_types and job.annotators:
        yield f"  {job.annotators.work}"
