"""Several sources of prompts: which rows are whose, whether the sources fit together, how many rows of each are drawn.

A row is known as one of a source by its column `source`, the file or the data set that it is from.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa

from rdpo.config import Job
from rdpo.config import Prompts as Settings
from rdpo.errors import InputError, named
from rdpo.files.stage_folder import StageFolder
from rdpo.records import ID_COLUMN, SIDES, unit_draw
from rdpo.synthesis.columns import Needed, Reading
from rdpo.synthesis.hub import PREFIX
from rdpo.synthesis.sources import source_columns, source_files

SCORES = [f"score_{side}" for side in SIDES]
NOT_DRAWN = "not drawn: there are more prompts of its source than its share"
Places = Mapping[str, int]
"""Files and data sets, with the number of the source that each belongs to."""


def alone(job: Job, also: Sequence[Needed] = ()) -> list[tuple[Job, Reading]]:
    """The job with each of its sources as the only one, and how that is read.

    `also`: columns that every source must have beside those of its prompts.
    """
    parts = [job.model_copy(update={"prompts": one}) for one in job.prompts.each()]
    if not job.prompts.sources:
        readings = [Reading.of_prompts(job)]
    else:
        places = _hub_places(job.prompts)
        readings = [Reading.of_prompts(part, number, places.get(number)) for number, part in enumerate(parts)]
    return [(part, replace(one, needed=(*one.needed, *also))) for part, one in zip(parts, readings, strict=True)]


def check_together(job: Job, also: Sequence[Needed] = ()) -> None:
    """Look at the beginnings of several sources.

    `also`: as for `alone`.

    Raises:
        InputError: one is missing or lacks a column, two read the same file, or only some have scores.
    """
    places_of(job.prompts)
    columns = [source_columns(part.prompts, reading) for part, reading in alone(job, also)]
    if job.synthesis.task is not None:
        return
    scored = [number for number, names in enumerate(columns) if set(SCORES) <= set(names)]
    without = [number for number in range(len(columns)) if number not in scored]
    if scored and without:
        one, other = job.prompts.sources[without[0]].source, job.prompts.sources[scored[0]].source
        lacking = next(name for name in SCORES if name not in columns[without[0]])
        raise InputError(
            f"prompts.sources.{without[0]}: {one} has no column `{lacking}`, and {other} has scores; "
            "give both columns of scores in all sources, or in none"
        )


def places_of(settings: Settings) -> Places:
    """The files and data sets of several sources.

    Raises:
        InputError: a source is missing, or two of them read the same file.
    """
    found: dict[str, int] = {place: number for number, place in _hub_places(settings).items()}
    for number, one in enumerate(settings.sources):
        if one.source.startswith(PREFIX):
            continue
        with named(f"prompts.sources.{number}"):
            files = source_files(one.source)
        for path in files:
            if path in found:
                raise InputError(
                    f"prompts.sources.{number}: {path} is read by prompts.sources.{found[path]} too; name it once"
                )
            found[path] = number
    return found


def _hub_places(settings: Settings) -> dict[int, str]:
    """What the rows of data sets of the hub are known by; several parts of one data set by what tells them apart."""
    of_hub = {number: one for number, one in enumerate(settings.sources) if one.source.startswith(PREFIX)}
    times = Counter(one.source for one in of_hub.values())

    found = {}
    for number, one in of_hub.items():
        parts = [one.source] if times[one.source] == 1 else [one.source, one.subset, one.dataset_split]
        found[number] = " ".join(filter(None, parts))
    return found


def counts(folder: StageFolder, places: Places) -> dict[int, dict[str, int]]:
    """How many kept rows each source has in each split, and under `dropped` how many dropped ones."""
    found: dict[int, Counter[str]] = {number: Counter() for number in sorted(set(places.values()))}
    for part in folder.tables(columns=["source", "split"]):
        for source, split in zip(part["source"].to_pylist(), part["split"].to_pylist(), strict=True):
            found[places[source]][split] += 1
    for part in folder.tables("dropped", ["source"]):
        for source in part["source"].to_pylist():
            found[places[source]]["dropped"] += 1
    return {number: dict(sorted(counted.items())) for number, counted in found.items()}


def not_drawn(
    folder: StageFolder, settings: Settings, places: Places, split: str, seed: int
) -> Callable[[pa.Table], list[bool]]:
    """Which rows are too many for the shares of their sources.

    Of the split that is trained on as many rows are drawn as the shares allow: all of the source that is scarcest for
    its share. Other splits are thinned in the same measure, rounded up. Who is drawn depends on seed and id alone.

    Args:
        folder: the rows that are kept so far.
        settings: the sources, with a share each.
        places: of these sources.
        split: the one that is trained on.
        seed: of the draw.

    Raises:
        InputError: a source has no row to train on, or so small a share that none of its rows is drawn.
    """
    draws: dict[tuple[int, str], list[float]] = defaultdict(list)
    for part in folder.tables(columns=[ID_COLUMN, "source", "split"]):
        for row in part.to_pylist():
            draws[places[row["source"]], row["split"]].append(unit_draw(seed, row[ID_COLUMN], "share"))

    quotas = _quotas([len(draws[number, split]) for number in range(len(settings.sources))], settings, split)
    last: dict[tuple[int, str], float] = {}
    for (number, of), found in draws.items():
        measure = quotas[number] / len(draws[number, split])
        kept = quotas[number] if of == split else math.ceil(measure * len(found))
        if found:
            last[number, of] = sorted(found)[kept - 1]

    def lost(part: pa.Table) -> list[bool]:
        rows = part.select([ID_COLUMN, "source", "split"]).to_pylist()
        return [unit_draw(seed, row[ID_COLUMN], "share") > last[places[row["source"]], row["split"]] for row in rows]

    return lost


def _quotas(available: list[int], settings: Settings, split: str) -> list[int]:
    """How many rows of each source are drawn, of so many."""
    shares = [one.share or 0.0 for one in settings.sources]
    for number, count in enumerate(available):
        if not count:
            source = settings.sources[number].source
            raise InputError(
                f"prompts.sources.{number}: no usable prompt in the {split} split of {source}; correct it, or remove it"
            )

    total = min(count / share for count, share in zip(available, shares, strict=True))
    # What is exact on paper may be a hair less in floating point.
    quotas = [min(count, math.floor(share * total + 1e-9)) for count, share in zip(available, shares, strict=True)]
    if 0 in quotas:
        number = quotas.index(0)
        raise InputError(
            f"prompts.sources.{number}: its share is less than one prompt beside {sum(quotas)} of the others; raise "
            "share, or remove the source"
        )
    return quotas
