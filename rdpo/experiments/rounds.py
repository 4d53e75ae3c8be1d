"""Rounds: the whole run again and again, each from the model that the last one made.

In each round the policy is its own start model and reference, its own teacher where the job names none, and its own
implicit reward against an earlier model (DICE, arXiv 2406.09760). Every round is a run of its own in `rounds/N`, with
its own report; the model of the last round that raised the watched reward becomes the model of the whole.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rdpo.config import Job, Prompts, Student
from rdpo.errors import InputError
from rdpo.evaluation.compare import KL_ANSWERS
from rdpo.evaluation.intervals import Estimate, with_interval
from rdpo.execution.lock import Check
from rdpo.execution.pipeline import locked, run_stages
from rdpo.execution.reader import round_dir
from rdpo.execution.run import Run
from rdpo.files.stage_folder import StageFolder
from rdpo.preference.rewards.registry import kind_of
from rdpo.stages.checks import prepare
from rdpo.stages.table import stages_of
from rdpo.tracking.console import Console
from rdpo.tracking.tables import aligned

MODEL, ADAPTER, MADE = "model", "adapter", "made"


def run_rounds(job: Job, run_dir: str, console: Console, check: Check = lambda: None) -> None:
    """Bring every round up to date, until one does not raise the watched reward.

    `check` asks whether the run directory is still this driver's.
    """
    from rdpo.report.report import ReportSoFar, headline, write_report

    starts, shown = [job.student.model], []
    for number in range(1, job.rounds.count + 1):
        console.say(f"\nround {number}, from {starts[-1]}")
        console.tell("round_begin", round=number, start=starts[-1])
        folder, of_round = round_dir(run_dir, number), job_of_round(job, number, starts)
        with locked(of_round, folder, say=console.say) as check_round:
            stages = stages_of(of_round)
            run = Run(of_round, folder, console, prepare, on_stage=ReportSoFar(), stages=stages, check=check_round)
            run_stages(run, stages)
            path = write_report(folder)
        for line in [*headline(folder), f"report      {path}"]:
            console.say(line)
        outcome = Outcome(number, run, job.rounds.watch)
        shown.append(outcome)
        console.tell("round_end", round=number, gain=outcome.gain, evaluation=outcome.summary)
        if outcome.gain <= job.rounds.min_gain:
            console.say(f"\nround {number} moved {job.rounds.watch} by {outcome.gain:+.3f}: the last one")
            break
        # The next round begins with what this one has published.
        starts.append(os.path.join(folder, MODEL))
    for line in table(shown):
        console.conclude(line)
    console.conclude(
        f"\nwhich round is taken goes by {job.rounds.watch} on these prompts: its gain is somewhat too high"
    )
    # Another driver may have taken the run over in the meantime: only one may write its model.
    check()
    _take(run_dir, len(starts) - 1, console)


def _take(run_dir: str, number: int, console: Console) -> None:
    """Make a round's model the model of the whole, unless it is that already."""
    taken = StageFolder(run_dir, MODEL)
    if not number:
        taken.clear()
        console.conclude("\nno round raised the watched reward: the start model stays")
        console.tell("result", model=None, round=0)
        return

    of_round = StageFolder(round_dir(run_dir, number), MODEL)
    if not _same(taken, of_round):
        # Copied, as whoever publishes a model edits files in it: the next repetition goes by the round's own.
        taken.take_over(of_round, share=False)

    console.conclude(f"\nmodel       {taken.address()}, of round {number}")
    console.tell("result", model=taken.address(), round=number)


def _same(taken: StageFolder, of_round: StageFolder) -> bool:
    """Whether a folder holds just what was taken from the round, and all of it."""
    own, theirs = taken.manifest(), of_round.manifest()
    if own is None or theirs is None or own.digest != theirs.digest:
        return False
    return set(own.files) <= set(taken.files())


def job_of_round(job: Job, number: int, starts: Sequence[str]) -> Job:
    """The job of round `number`, from 1; `starts` are the start models of all rounds up to it."""
    changes: dict[str, Any] = {"name": f"{job.name}-{number}", "rounds": job.rounds.model_copy(update={"count": 1})}
    if number > 1:
        changes["student"] = _student_of(job, starts[number - 1])
        changes["prompts"] = _prompts_of(job, starts[1])
        if job.selection and job.selection.pairs and job.selection.reference is None:
            # The policy's implicit rewards are against the model that it was trained from.
            changes["selection"] = job.selection.model_copy(update={"reference": starts[number - 2]})
        if job.rounds.reward_reference == "previous":
            # Of later rounds the start is a whole model, which the one before published.
            adapter = job.student.adapter if number == 2 else None
            changes["rewards"] = [kind_of(reward).against(starts[number - 2], adapter) for reward in job.rewards]
    return job.model_copy(update=changes)


def _student_of(job: Job, published: str) -> Student:
    """The student of a later round: the model that the round before has published, or its adapter on the first one."""
    if job.student.continues:
        return job.student.model_copy(update={"adapter": os.path.join(published, ADAPTER)})
    whole = {"model": published, "revision": None, "adapter": None, "adapter_use": "merge"}
    return job.student.model_copy(update=whole)


def _prompts_of(job: Job, published: str) -> Prompts:
    """The prompts of later rounds: those that the first round made, where it did. `published`: its model."""
    if job.prompts.made is None:
        return job.prompts
    made = os.path.join(os.path.dirname(published), MADE)
    return job.prompts.model_copy(update={"source": made, "made": None})


class Outcome:
    """What came of one round."""

    def __init__(self, number: int, run: Run, watch: str):
        self.number = number
        self.summary = run.require("evaluation", "rounds").summary
        self.pairs = run.require("reference", "rounds").rows_out
        self.shaping: dict[str, float] = run.require("pairs", "rounds").summary.get("shaping", {})
        if not self.summary["prompts"]:
            raise InputError(f"rounds: round {number} has no evaluated prompt; see the dropped rows of its evaluation")
        watched = next((of for of in self.summary["rewards"] if of["reward"] == watch), self.summary["optimised"])
        self.gain: float = watched["difference"]["mean"]


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """The rounds as lines of text, a block for each reward."""
    head = ["round", "pairs", "start", "trained", "beats its start (95%)", "KL, nats", "tokens", "length gap"]
    lines = []
    for place, reward in enumerate(outcomes[0].summary["rewards"]):
        kind = "optimised" if reward["weight"] else "independent"
        lines += ["", f"{reward['reward']} ({kind}), {outcomes[0].summary['prompts']} prompts"]
        lines += aligned([head, *(_cells(outcome, place) for outcome in outcomes)], right=[1, 2, 3, 6, 7])
    return lines


def _cells(outcome: Outcome, place: int) -> list[str]:
    reward, summary = outcome.summary["rewards"][place], outcome.summary
    rate, has_kl = reward["win_rate"], summary["kl"] and KL_ANSWERS in summary
    wins = f"{rate['mean']:.2f} ({rate['low']:.2f} to {rate['high']:.2f})"
    gap = outcome.shaping.get("mean_length_gap", float("nan"))
    return [
        str(outcome.number),
        str(outcome.pairs),
        f"{reward['start_mean']:.3f}",
        f"{reward['trained_mean']:.3f}",
        wins,
        with_interval(Estimate(**summary["kl"]), ".1f") if has_kl else "-",
        f"{summary['length']['trained']['mean']:.0f}",
        f"{gap:.1f}",
    ]
