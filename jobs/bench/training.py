"""rdpo against TRL's DPOTrainer on two workloads: a table, and as the last line one JSON object.

    python jobs/bench/training.py PAIRS.jsonl [options of contender.py]

`real` is the pairs of the file; `long` puts prompts of several of its texts together and keeps answers short,
which is what judged conversations and retrieval look like. Each contender has its own process; they take
turns, so that neither has the machine to itself at a better time of day.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
PROMPT_WORDS, ANSWER_WORDS = 330, 90
TRAINERS = ("trl", "rdpo")
WORKLOADS = ("real", "long")


def long_prompts(source: Path, target: Path) -> None:
    """Pairs with prompts of several hundred tokens and short answers, from the texts of real pairs."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    lines = []
    for index, row in enumerate(rows):
        texts = (rows[(index + step) % len(rows)]["chosen"] for step in range(1, len(rows)))
        words = row["prompt"].split()
        while len(words) < PROMPT_WORDS:
            words += next(texts).split()
        sides = {side: " ".join(row[side].split()[:ANSWER_WORDS]) for side in ("chosen", "rejected")}
        if sides["chosen"] != sides["rejected"]:
            lines.append(json.dumps({"prompt": " ".join(words[:PROMPT_WORDS]), **sides}))
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(trainer: str, pairs: Path, options: list[str]) -> dict:
    """One contender's figures, or why it has none."""
    command = [sys.executable, str(HERE / "contender.py"), trainer, str(pairs), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        print(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}", file=sys.stderr, flush=True)
        return {"failed": (result.stderr.strip().splitlines() or ["without a word"])[-1]}
    figures = json.loads(result.stdout.strip().splitlines()[-1])
    print(json.dumps(figures), flush=True)
    return figures


def compare(
    source: Path, options: list[str], workloads: Sequence[str] | None = None, trainers: Sequence[str] | None = None
) -> dict:
    """Figures of both trainers on both workloads, and their ratios."""
    report: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as directory:
        long = Path(directory) / "long.jsonl"
        long_prompts(source, long)
        files = {"real": source, "long": long}
        for workload in workloads or WORKLOADS:
            report[workload] = {trainer: run(trainer, files[workload], options) for trainer in trainers or TRAINERS}
            report[workload] |= ratios(report[workload])
    return report


def ratios(results: dict[str, dict]) -> dict[str, float]:
    """How the trainers compare, where both have figures."""
    if len(results) < len(TRAINERS) or any("failed" in figures for figures in results.values()):
        return {}
    theirs, ours = (results[trainer] for trainer in TRAINERS)
    differences = [abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
    return {
        "pairs_ratio": ours["pairs_per_second"] / theirs["pairs_per_second"],
        "largest_loss_difference": max(differences),
    }


def table(report: dict) -> str:
    """The report as text."""
    lines = [f"{'workload':<10}{'trainer':<9}{'pairs/s':>9}{'tokens/s':>10}{'padding':>9}{'peak GiB':>10}{'MFU':>7}"]
    for workload, results in report.items():
        for trainer in filter(results.__contains__, TRAINERS):
            row = results[trainer]
            if "failed" in row:
                lines.append(f"{workload:<10}{trainer:<9}failed: {row['failed']}")
                continue
            lines.append(
                f"{workload:<10}{trainer:<9}{row['pairs_per_second']:>9.3f}{row['tokens_per_second']:>10.0f}"
                f"{row['padding']:>9.2f}{row['peak_gib']:>10.2f}{row['mfu']:>7.2f}"
            )
        if "pairs_ratio" in results:
            lines.append(
                f"{workload:<10}rdpo / TRL: {results['pairs_ratio']:.2f} times the pairs; losses differ by at most "
                f"{results['largest_loss_difference']:.1e} of their size"
            )
    return "\n".join(lines)


def any_failed(report: dict) -> bool:
    """Whether a contender has no figures."""
    return any("failed" in results.get(trainer, {}) for results in report.values() for trainer in TRAINERS)


def main() -> None:
    """Run all four, print the table and the JSON."""
    report = compare(Path(sys.argv[1]), sys.argv[2:])
    print(table(report))
    print(json.dumps(report))
    sys.exit(any_failed(report))


if __name__ == "__main__":
    main()
