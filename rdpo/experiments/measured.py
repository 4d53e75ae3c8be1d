"""What a comparison measures: an arm with one seed, or each round of it where its job has several."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from rdpo.config import Job
from rdpo.config.comparison import Comparison
from rdpo.execution.reader import round_dir
from rdpo.experiments.rounds import MODEL, job_of_round
from rdpo.files.stage_folder import StageFolder
from rdpo.records import ID_COLUMN, Row, by_id

ROUND = ", round "


@dataclass(frozen=True)
class Measured:
    """One run of a comparison: round `number`, from 1, of `rounds`.

    `job` is that of the round, `home` the directory of the arm and seed.
    """

    arm: str
    seed: int
    number: int
    rounds: int
    job: Job = field(compare=False)
    home: str

    @property
    def folder(self) -> str:
        """Its run directory."""
        return self.home if self.rounds == 1 else round_dir(self.home, self.number)

    @property
    def label(self) -> str:
        """What tables call it: the arm's name, and the round where there are several."""
        return self.arm if self.rounds == 1 else f"{self.arm}{ROUND}{self.number}"

    @property
    def start_is_there(self) -> bool:
        """Whether the model that this round begins with has been made."""
        return self.number == 1 or StageFolder(round_dir(self.home, self.number - 1), MODEL).manifest() is not None


def arm_of(label: str) -> str:
    """The arm that a label is of."""
    return label.partition(ROUND)[0]


def runs_of(arm: str, seed: int, job: Job, home: str) -> list[Measured]:
    """The runs of one arm and seed in their directory, in order."""
    count = job.rounds.count
    if count == 1:
        return [Measured(arm, seed, 1, 1, job, home)]

    numbers = range(1, count + 1)
    starts = [job.student.model, *(os.path.join(round_dir(home, number), MODEL) for number in numbers[:-1])]
    return [Measured(arm, seed, number, count, job_of_round(job, number, starts), home) for number in numbers]


def rivals_of(comparison: Comparison, runs: Iterable[Measured]) -> dict[str, str]:
    """What each label is held against: the baseline after as many rounds, or after its last."""
    found = list(runs)
    counts = {run.arm: run.rounds for run in found}
    labels = {(run.arm, run.number): run.label for run in found}
    rivals = {}
    for run in found:
        baseline = comparison.rivals[run.arm]
        rivals[run.label] = labels[baseline, min(run.number, counts[baseline])]
    return rivals


def comparable(runs: Collection[Measured]) -> dict[str, dict[str, float]]:
    """The weights of the rewards by label: of those that measure the same in all runs.

    An implicit reward that goes along with the rounds is measured against another model in each.
    """
    moving = _moving(runs)
    return {
        run.label: {reward.name: reward.weight for reward in run.job.rewards if reward.name not in moving}
        for run in runs
    }


def left_out(runs: Collection[Measured]) -> list[str]:
    """What is measured in rounds and stands in no table, as lines of text."""
    lines = [f"{name} is another reward in each round, and is not compared" for name in _moving(runs)]
    if any(run.rounds > 1 and run.job.pairs.heldout_fraction for run in runs):
        lines.append("held-out pairs are others in each round, and are not compared")
    return ["", *lines] if lines else []


def _moving(runs: Collection[Measured]) -> list[str]:
    """Names of the rewards that go along with the rounds of an arm."""
    names: dict[str, None] = {}
    for run in runs:
        if run.rounds > 1 and run.job.rounds.reward_reference == "previous":
            names |= dict.fromkeys(reward.name for reward in run.job.rewards if reward.kind == "implicit")
    return list(names)


def from_the_first(rows: Mapping[Measured, list[Row]]) -> Iterator[tuple[tuple[str, int], list[Row]]]:
    """The rows of a stage by label and seed, each beside the start of its arm's first round.

    A round's own rows are beside that round's start. Its KL is from there too, and is left out of later rounds.
    """
    first = {(run.arm, run.seed): by_id(of_run) for run, of_run in rows.items() if run.number == 1}
    for run, of_run in rows.items():
        starts = first.get((run.arm, run.seed), {})
        if run.number > 1:
            of_run = [_beside(row, starts[row[ID_COLUMN]]) for row in of_run if row[ID_COLUMN] in starts]
        yield (run.label, run.seed), of_run


def added_up(rows: Mapping[Measured, list[Row]]) -> Iterator[tuple[tuple[str, int], list[Row]]]:
    """The log-ratios (`kl`) of texts by label and seed, each from the start of its arm's first round.

    A round begins with the model that the one before made, so that the log-ratios of rounds add up.
    """
    sums: dict[tuple[str, int], dict[str, float]] = {}
    for run, of_run in rows.items():
        before = sums.get((run.arm, run.seed), {})
        found = [row for row in of_run if run.number == 1 or row[ID_COLUMN] in before]
        totals = {row[ID_COLUMN]: row["kl"] + before.get(row[ID_COLUMN], 0.0) for row in found}
        sums[run.arm, run.seed] = totals
        yield (run.label, run.seed), [{**row, "kl": totals[row[ID_COLUMN]]} for row in found]


def _beside(row: Row, first: Row) -> Row:
    start = {name: value for name, value in first.items() if name.startswith("start")}
    return {**row, **start, "kl": None}
