"""When does a reward inside the loss help? Label noise against the reward's accuracy, for seven ways to use both.

    rdpo run jobs/quickstart.toml --run-dir runs/noise-base --until reference --set synthesis.limit=128
        --set pairs.min_gap=-99 --set pairs.heldout_fraction=0.5
    python jobs/bench/noise_accuracy.py runs/noise-base [--flips 0 0.2 0.4] [--accuracies 0.55 0.75 0.95]
        [--seeds 0 1 2] [--steps 8] [--strengths 0.3 1 3] [--picture FILE.svg]

The pairs of a run's reference stage are taken as right. A share of them is turned round (the noise), and each gets the
reward gap of a reward of known accuracy: right side plus 1, plus normal noise of such a spread that the sign is right
that often. Its scale is taken out, so that one strength serves all cells of the figure. Each case trains the run's
student anew, in this process and without Ray, and is measured on pairs that the run holds out, which are never turned
round. What is done is kept in RUN_DIR/noise_accuracy.jsonl, and not done again.

How strongly the reward enters (lambda; the inverse temperature of a soft label or a weight) is chosen for each way in
the same manner: of `--strengths` the one that does best at 20% noise and a reward that is right on 75%, with a seed of
its own, on a third of the held-out pairs. The figure is measured on the others. Robust and conservative DPO are told
the true share of noise, which nobody knows of his own data.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pyarrow as pa
import torch

from rdpo.config import Job
from rdpo.evaluation.intervals import Estimate, with_interval
from rdpo.execution.reader import job_of_run
from rdpo.experiments.heldout import HeldoutResult, Margins, heldout_results
from rdpo.tracking.tables import aligned
from rdpo.training.loop import PairTable, Trainer, step_pairs

KEPT = "noise_accuracy.jsonl"
PARTS = 2
"""Cases at the same time, each on one core."""
CASES = 6
"""That a process does: DeepSpeed keeps something of every engine, a third of a GiB."""
MORE = 3
"""The exit code of a process that has left cases to the next one."""
BASELINE = "dpo"
WITH_REWARD: dict[str, dict[str, Any]] = {
    "offset": {"reward_as": "offset"},
    "soft label": {"reward_as": "soft_label"},
    "weight": {"reward_as": "weight"},
    "filter": {"reward_as": "none"},
}
WITHOUT: dict[str, dict[str, Any]] = {
    BASELINE: {"reward_as": "none"},
    "robust": {"loss": "robust", "reward_as": "none"},
    "conservative": {"reward_as": "none"},
}
TOLD_NOISE = ("robust", "conservative")
STRENGTH = {"offset": "offset_coef", "soft label": "reward_temperature", "weight": "reward_temperature"}
TUNED_AT, TUNED_WITH = (0.2, 0.75), 99
"""The noise and the accuracy at which strengths are chosen, and the seed."""
COMMON: dict[str, Any] = {"num_workers": 1, "zero_stage": 0, "batch_size": 4, "sft_coef": 0.0, "learning_rate": 2e-4}
COMMON |= {"reward_norm": "zscore", "select": "last"}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
PORT = 29561


@dataclass(frozen=True)
class Case:
    """One training: a way to use pairs and reward, a share of noise, the reward's accuracy, a seed, a strength."""

    way: str
    flip: float
    accuracy: float | None
    seed: int
    strength: float = 1.0

    @property
    def cell(self) -> tuple[float, float | None]:
        """Where it stands in the figure."""
        return self.flip, self.accuracy


def tuning_cases(strengths: Sequence[float]) -> Iterator[Case]:
    """What is done to choose strengths."""
    for way in STRENGTH:
        yield from (Case(way, *TUNED_AT, TUNED_WITH, strength) for strength in strengths)


def cases(given: argparse.Namespace, chosen: Mapping[str, float]) -> Iterator[Case]:
    """All cases of the figure, seed by seed, so that what is done early is a whole table."""
    for seed in given.seeds:
        for flip in given.flips:
            # Without noise to be told of, the others are DPO.
            yield from (Case(way, flip, None, seed) for way in WITHOUT if flip or way == BASELINE)
            for accuracy in given.accuracies:
                yield from (Case(way, flip, accuracy, seed, chosen.get(way, 1.0)) for way in WITH_REWARD)


def gaps(pairs: int, accuracy: float | None, seed: int) -> list[float]:
    """How much better the better answer of each pair is by a reward that is right that often."""
    draw = random.Random(f"{seed} {accuracy}")
    spread = 1 / NormalDist().inv_cdf(accuracy) if accuracy else 0.0
    return [1 + spread * draw.gauss(0, 1) for _ in range(pairs)]


def noisy(pairs: pa.Table, case: Case) -> pa.Table:
    """The pairs with noise in their order and the gaps of a reward of known accuracy."""
    draw, rows = random.Random(f"{case.seed} {case.flip}"), pairs.to_pylist()
    turned = set(draw.sample(range(len(rows)), round(case.flip * len(rows))))

    made = []
    for place, gap in enumerate(gaps(len(rows), case.accuracy, case.seed)):
        row = rows[place]
        if place in turned:
            row, gap = _turned_round(row), -gap
        made.append({**row, "reward_gap": gap})
    kept = [row for row in made if row["reward_gap"] > 0] if case.way == "filter" else made
    return pa.Table.from_pylist(kept, schema=pairs.schema)


def _turned_round(row: dict[str, Any]) -> dict[str, Any]:
    """The pair with its sides in each other's place."""
    other = {name: name.replace("chosen", "?").replace("rejected", "chosen").replace("?", "rejected") for name in row}
    return {name: row[other[name]] for name in row}


def job_of(base: Job, case: Case, steps: int) -> Job:
    """The job of a case."""
    own = {**WITH_REWARD, **WITHOUT}[case.way]
    told = {"label_smoothing": case.flip} if case.way in TOLD_NOISE and case.flip else {}
    changes = {**COMMON, **own, **told, "max_steps": steps}
    if setting := STRENGTH.get(case.way):
        changes[setting] = 1 / case.strength if setting == "reward_temperature" else case.strength
    training = type(base.training).model_validate({**base.training.model_dump(), **changes})
    return base.model_copy(update={"seed": case.seed, "training": training})


def trained(base: Job, run_dir: str, case: Case, steps: int) -> dict[str, float]:
    """Margins of the held-out pairs, by id, after a training."""
    data = PairTable.of(noisy(PairTable.load(run_dir).table, case))
    job = job_of(base, case, steps)
    trainer = Trainer(job, data, torch.device("cpu"))
    batches: list[list[int]] = []
    while len(batches) < steps:
        batches += list(step_pairs(len(data), job))[: steps - len(batches)]
    for index, batch in enumerate(batches):
        trainer.step(index, steps, batch)
    return {row["prompt_id"]: row["margin"] for row in trainer.margins(PairTable.load(run_dir, heldout=True))}


def work(given: argparse.Namespace, number: int) -> int:
    """Some of one part's cases, in this process; each is written down when it is done. The exit code."""
    torch.set_num_threads(1)
    for name, value in {**ALONE, "MASTER_PORT": str(PORT + number)}.items():
        os.environ.setdefault(name, value)
    torch.distributed.init_process_group("gloo")
    base, known = job_of_run(given.run_dir), done(given.run_dir)
    wanted = tuning_cases(given.strengths) if given.tune else cases(given, chosen_strengths(given))
    left = [case for place, case in enumerate(wanted) if place % PARTS == number and (case, given.steps) not in known]
    for case in left[:CASES]:
        margins = trained(base, given.run_dir, case, given.steps)
        with (Path(given.run_dir) / KEPT).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"case": asdict(case), "steps": given.steps, "margins": margins}) + "\n")
        print(case, flush=True)
    return MORE if len(left) > CASES else 0


def done(run_dir: str) -> dict[tuple[Case, int], dict[str, float]]:
    """The margins of the cases that are done, by case and steps."""
    path = Path(run_dir) / KEPT
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {(Case(**one["case"]), one["steps"]): one["margins"] for one in found}


def for_tuning(margins: Mapping[str, float]) -> set[str]:
    """The third of the held-out pairs on which strengths are chosen."""
    return set(sorted(margins)[::3])


def chosen_strengths(given: argparse.Namespace) -> dict[str, float]:
    """Of each way the strength with the most pairs right, of equals that with the larger margin."""
    known = done(given.run_dir)
    best: dict[str, tuple[float, float, float]] = {}
    for case in tuning_cases(given.strengths):
        margins = known[case, given.steps]
        looked_at = [margins[name] for name in for_tuning(margins)]
        right = sum(margin > 0 for margin in looked_at) / len(looked_at)
        best[case.way] = max(
            best.get(case.way, (-1.0, 0.0, 0.0)), (right, sum(looked_at) / len(looked_at), case.strength)
        )
    return {way: strength for way, (_, _, strength) in best.items()}


def results(given: argparse.Namespace) -> dict[tuple[float, float | None], list[HeldoutResult]]:
    """Of each cell of the figure all ways, each held against DPO with the same noise."""
    known, wanted = done(given.run_dir), set(cases(given, chosen_strengths(given)))
    found = {}
    for flip in given.flips:
        for accuracy in given.accuracies:
            margins: Margins = {}
            for (case, steps), of_case in known.items():
                if steps == given.steps and case in wanted and case.flip == flip and case.accuracy in (None, accuracy):
                    tuned = for_tuning(of_case)
                    margins[case.way, case.seed] = {name: one for name, one in of_case.items() if name not in tuned}
            rivals = dict.fromkeys([*WITHOUT, *WITH_REWARD], BASELINE)
            found[flip, accuracy] = heldout_results(margins, rivals)
    return found


def best_of(of_cell: Sequence[HeldoutResult]) -> HeldoutResult:
    """The way with the highest accuracy on held-out pairs; of equals that with the larger margin."""
    return max(of_cell, key=lambda one: (one.accuracy.mean, one.margin.mean))


def table(found: dict[tuple[float, float | None], list[HeldoutResult]]) -> list[str]:
    """Every way in every cell, as lines of text."""
    cells = [["noise", "reward right", "way", "prefers chosen", "against DPO", "margin"]]
    for (flip, accuracy), of_cell in found.items():
        best = best_of(of_cell) if of_cell else None
        for one in of_cell:
            figures = [with_interval(one.accuracy, ".3f"), with_interval(one.against, "+.3f")]
            mark = " *" if one is best else ""
            cells.append([f"{flip:.0%}", f"{accuracy:.0%}", one.arm + mark, *figures, f"{one.margin.mean:.2f}"])
    return aligned(cells, right=[0, 1])


def right_on(given: argparse.Namespace) -> list[str]:
    """Shares of the training pairs on which the rewards are in fact right, over the seeds."""
    pairs, shares = len(PairTable.load(given.run_dir)), []
    for accuracy in given.accuracies:
        right = [gap > 0 for seed in given.seeds for gap in gaps(pairs, accuracy, seed)]
        shares.append(f"{sum(right) / len(right):.2f} (for {accuracy:g})")
    return shares


def picture(found: dict[tuple[float, float | None], list[HeldoutResult]], file: str) -> None:
    """Which way is best where: noise upwards, the reward's accuracy to the right; grey where none beats DPO."""
    from matplotlib import pyplot

    flips, accuracies = (sorted({cell[axis] or 0.0 for cell in found}) for axis in (0, 1))
    figure, axis = pyplot.subplots(figsize=(1.5 * len(accuracies) + 1, 0.9 * len(flips) + 1))
    colours = dict(zip(WITH_REWARD, ("#3d78e0", "#3a8f5c", "#9a5bc4", "#c75a3b"), strict=True))
    for (flip, accuracy), of_cell in found.items():
        best = best_of(of_cell)
        at = accuracies.index(accuracy or 0.0), flips.index(flip)
        surely = best.against.low > 0
        colour = colours.get(best.arm, "#a07a1c") if surely else "#7a808a"
        axis.add_patch(pyplot.Rectangle((at[0] - 0.5, at[1] - 0.5), 1, 1, color=colour, alpha=0.35, linewidth=0))
        gain = Estimate(best.against.mean, best.against.low, best.against.high)
        said = (
            f"{best.arm}\n{best.accuracy.mean:.2f}, {gain.mean:+.2f}" if surely else f"none\n{best.accuracy.mean:.2f}"
        )
        axis.text(*at, said, ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(accuracies)), [f"{value:.0%}" for value in accuracies])
    axis.set_yticks(range(len(flips)), [f"{value:.0%}" for value in flips])
    axis.set_xlim(-0.5, len(accuracies) - 0.5)
    axis.set_ylim(-0.5, len(flips) - 0.5)
    axis.set_xlabel("pairs on which the reward is right")
    axis.set_ylabel("pairs turned round")
    figure.tight_layout()
    figure.savefig(file)


def in_parts(*arguments: str) -> None:
    """Do the cases in processes of this program."""
    command = [sys.executable, __file__, *sys.argv[1:], *arguments, "--part"]
    codes = {MORE}
    while MORE in codes:
        parts = [subprocess.Popen([*command, str(number)]) for number in range(PARTS)]
        codes = {part.wait() for part in parts}
        if codes - {0, MORE}:
            sys.exit("a part has failed")


def main() -> None:
    """Choose strengths, do what is not done yet, in two processes; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir")
    parser.add_argument("--flips", type=float, nargs="+", default=[0.0, 0.2, 0.4])
    parser.add_argument("--accuracies", type=float, nargs="+", default=[0.55, 0.75, 0.95])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3, 1.0, 3.0])
    parser.add_argument("--picture", help="an SVG file")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--tune", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part is not None:
        sys.exit(work(given, given.part))

    in_parts("--tune")
    in_parts()
    print(f"on training pairs the rewards are right on {', '.join(right_on(given))}")
    print("strengths:", ", ".join(f"{way} {strength:g}" for way, strength in chosen_strengths(given).items()))
    found = results(given)
    print("\n".join(table(found)))
    if given.picture:
        picture(found, given.picture)


if __name__ == "__main__":
    main()
