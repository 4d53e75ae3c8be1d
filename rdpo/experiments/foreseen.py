"""What a comparison would do: of each arm and seed the stages that would be made, and those that others make for it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from rdpo.config.comparison import Comparison
from rdpo.execution.pipeline import planned
from rdpo.experiments.comparison import Jobs, check_seeds, runs_in, stages_of_round
from rdpo.records import digest
from rdpo.stages.checks import check_named

UP_TO_DATE = "up to date"


@dataclass(frozen=True)
class Foreseen:
    """One arm and seed: the stages that would be made, those that are there, and which run makes the others for it."""

    arm: str
    seed: int
    made: list[str]
    there: list[str]
    taken: dict[str, str]

    def __str__(self) -> str:
        parts = [f"makes {', '.join(self.made)}"] if self.made else []
        givers: dict[str, list[str]] = defaultdict(list)
        for stage, giver in self.taken.items():
            givers[giver].append(stage)
        parts += [f"takes {', '.join(stages)} of {giver}" for giver, stages in givers.items()]
        if self.there:
            parts.append(f"has {', '.join(self.there)}")
        return f"{self.arm}, seed {self.seed}: {'; '.join(parts)}"


def foreseen(comparison: Comparison, jobs: Jobs, run_dir: str, seeds: Collection[int] | None = None) -> list[Foreseen]:
    """What each arm and seed would do, in the order in which they would be run; with `seeds`, those alone.

    A stage counts as taken over where an earlier run has it with the same settings and all its inputs alike. Others may
    turn out to be so once they are made: a stage that reads of its inputs only what is the same.

    Raises:
        InputError: a model, a file or a reward that a job names is not there, or a seed is none of the comparison's.
    """
    check_seeds(comparison, seeds)
    owners: dict[str, str] = {}
    found = []
    for run in runs_in(jobs, run_dir):
        job, wanted = run.job, seeds is None or run.seed in seeds
        stages = stages_of_round(run, comparison.until)
        if not run.start_is_there:
            # Nothing is known of what begins with a model that is not there.
            found += [Foreseen(run.label, run.seed, [stage.name for stage in stages], [], {})] if wanted else []
            continue

        check_named(job)
        states = planned(job, run.folder, stages)
        line = Foreseen(run.label, run.seed, [], [], {})
        names: dict[str, str] = {}
        for stage in stages:
            inputs = {name: names.get(name) for name in stage.inputs}
            name = names[stage.name] = digest(stage.name, stage.settings(job), inputs)
            if states[stage.name] == UP_TO_DATE:
                line.there.append(stage.name)
            elif name in owners:
                line.taken[stage.name] = owners[name]
            else:
                line.made.append(stage.name)
            # What a seed that is not wanted has not made yet, nobody can take of it.
            if wanted or states[stage.name] == UP_TO_DATE:
                owners.setdefault(name, f"{run.label}, seed {run.seed}")
        if wanted:
            found.append(line)
    return found


def totals(runs: list[Foreseen]) -> str:
    """How often each stage would be made, over all runs."""
    counts = Counter(stage for run in runs for stage in run.made)
    if not counts:
        return f"{len(runs)} runs; nothing is to be made"
    return f"{len(runs)} runs; to be made: {', '.join(f'{count} x {stage}' for stage, count in counts.items())}"
