"""Groups of K answers against TRL's DPOTrainer on the same answers as pairs: a table, and as the last line JSON.

    python jobs/bench/groups.py [--answers 2 4 8 16] [--groups 2] [--steps 3] [options of contender.py]

Prompts have about 600 tokens, answers about 100. rdpo trains on whole groups, each prompt read once, with DPO of the
best answer against each other one; TRL is given those K - 1 pairs. Both take the same optimizer steps on the same
weights, so that their losses can be held against each other. The first step is not timed. Each contender has its own
process.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TRAINERS = ("trl", "rdpo")
PROMPT_WORDS, ANSWER_WORDS = 440, 72
WARM_STEPS = 1


def made_groups(count: int, answers: int) -> list[dict[str, Any]]:
    """Groups as the pairs stage leaves them: words of this repository's documents, in any order, the same each time."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    words, draw = re.findall(r"[a-z]{2,}", text), random.Random(0)

    def said(length: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(round(0.8 * length), round(1.2 * length))))

    rows = []
    for number in range(count):
        spoken = [[{"role": "assistant", "content": said(ANSWER_WORDS)}] for _ in range(answers)]
        between = len(spoken) - 2
        rows.append(
            {
                "prompt_id": f"{number:04d}",
                "prompt": [{"role": "user", "content": said(PROMPT_WORDS)}],
                "chosen": spoken[0],
                "rejected": spoken[-1],
                "chosen_finished": True,
                "rejected_finished": True,
                "reward_gap": 1.0,
                "others": spoken[1:-1],
                "others_finished": [True] * between,
                "score_others": [0.0] * between,
                "gap_others": [0.5] * between,
            }
        )
    return rows


def as_pairs(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The best answer of each group of a reference stage with each other one."""
    for row in rows:
        others = zip(row.get("others_ids") or (), row.get("reference_others_logps") or (), strict=True)
        ends = [(row["rejected_ids"], row["reference_rejected_logps"]), *others]
        for number, (ids, logps) in enumerate(ends):
            pair = {"prompt_id": f"{row['prompt_id']}/{number:02d}", "rejected_ids": ids}
            yield {**row, **pair, "reference_rejected_logps": logps, "others_ids": None}


def one(trainer: str, answers: int, options: argparse.Namespace, further: list[str]) -> dict[str, Any]:
    """Figures of one contender."""
    import contender
    import pyarrow as pa

    from rdpo.preference.reference import Reference
    from rdpo.training.loop import COLUMNS, PairTable

    pairs = options.groups * (answers - 1)
    # In bfloat16 the gradients of the same loss by two forwards differ by per cents, and the losses with them.
    given = [trainer, "-", "--steps", str(options.steps), "--max-length", "1024", "--dtype", "float32", *further]
    settings = contender.options_from([*given, "--batch-size", str(options.groups if trainer == "rdpo" else pairs)])
    settings.tokens_per_batch = max(settings.tokens_per_batch, 2 * settings.max_length, 600 + 180 * answers)
    job = contender.job_of(settings)

    groups = made_groups(options.steps * options.groups, answers)
    referred = Reference(job)(pa.Table.from_pylist(groups))
    if any(referred["dropped"].to_pylist()):
        sys.exit(f"groups were dropped: {set(referred['dropped'].to_pylist())}")
    whole = PairTable.of(referred)
    size = options.groups
    if trainer == "rdpo":
        batches = [list(range(start, start + size)) for start in range(0, len(whole), size)]
        steps = contender.run_rdpo(job, whole, batches, None)
    else:
        rows = pa.Table.from_pylist(list(as_pairs(referred.to_pylist()))).select(COLUMNS)
        batches = [list(range(start, start + pairs)) for start in range(0, len(rows), pairs)]
        # TRL takes whole forwards alone: one that does not divide the pairs would leave some out of each step.
        micro = max(size for size in range(1, settings.micro + 1) if pairs % size == 0)
        steps = contender.run_trl(job, PairTable.of(rows), batches, micro)
    found = contender.figures(whole, [list(range(n, n + size)) for n in range(0, len(whole), size)], steps)
    seconds = sum(steps.seconds[WARM_STEPS:])
    found["answers_per_second"] = answers * size * (options.steps - WARM_STEPS) / seconds
    return {name: found[name] for name in ("answers_per_second", "peak_gib", "mfu", "losses")}


def compare(options: argparse.Namespace, further: list[str]) -> dict[str, Any]:
    """Both contenders on groups of each size."""
    report: dict[str, Any] = {}
    for answers in options.answers:
        found = {trainer: in_process(trainer, answers, options, further) for trainer in options.trainers}
        report[str(answers)] = found
        if len(found) == len(TRAINERS):
            theirs, ours = (found[trainer] for trainer in TRAINERS)
            off = [abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
            found["ratio"] = ours["answers_per_second"] / theirs["answers_per_second"]
            found["losses_differ"] = max(off)
    return report


def in_process(trainer: str, answers: int, options: argparse.Namespace, further: list[str]) -> dict[str, Any]:
    """One contender, alone in its process."""
    own = ["--one", f"{trainer},{answers}", "--groups", str(options.groups), "--steps", str(options.steps)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, __file__, *own, *further], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        sys.exit(f"{trainer} with {answers} answers failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(trainer, answers, json.dumps(found), file=sys.stderr, flush=True)
    return found


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{'K':>3}  {'trainer':<8}{'answers/s':>10}{'peak GiB':>10}{'MFU':>7}"]
    for answers, found in report.items():
        for trainer in filter(found.__contains__, TRAINERS):
            row = found[trainer]
            rate = f"{row['answers_per_second']:>10.2f}{row['peak_gib']:>10.2f}{row['mfu']:>7.2f}"
            lines.append(f"{answers:>3}  {trainer:<8}{rate}")
        if "ratio" in found:
            differ = f"losses differ by at most {found['losses_differ']:.1e} of their size"
            lines.append(f"{answers:>3}  rdpo / TRL: {found['ratio']:.2f} times the answers; {differ}")
    return "\n".join(lines)


def main() -> None:
    """Compare, or be one of those compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, nargs="+", default=[2, 4, 8, 16], help="K")
    parser.add_argument("--groups", type=int, default=2, help="of one optimizer step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options, further = parser.parse_known_args()
    if options.one:
        trainer, answers = options.one.split(",")
        print(json.dumps(one(trainer, int(answers), options, further)))
        return
    report = compare(options, further)
    print(table(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
