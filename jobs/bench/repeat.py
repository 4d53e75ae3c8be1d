"""Does a row's text depend on anything but the row? The share of answers that stay the same, run against run.

    python jobs/bench/repeat.py [--rows 32] [--dtypes float32 bfloat16]

Every run answers the same prompts, greedily and by seeded sampling, and differs from the first in one thing: nothing,
two engines in place of one, the rows in reverse order, other blocks. Row by row seeds make equal logits give equal
texts; that the logits are equal is up to the engine, whose sums depend on what else is in its batch.
"""

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from rdpo.cluster.connection import start_ray
from rdpo.config import Job, load_job
from rdpo.records import Row, prompt_id
from rdpo.synthesis.teacher import synthesize

ROOT = Path(__file__).parents[2]
TURNS = ("greedy", "drawn")
TASK = 'name = "repeat"\n' + "".join(
    f'[[turns]]\nname = "{name}"\ntemperature = {temperature}\n'
    for name, temperature in zip(TURNS, (0, 1), strict=True)
)
PAIRS = ["pairs.chosen=greedy", "pairs.rejected=drawn"]
VARIANTS: dict[str, dict[str, Any]] = {
    "first run": {},
    "again": {},
    "two engines": {"concurrency": 2},
    "reverse order": {"reverse": True},
    "other blocks": {"batch_rows": 3},
}


def job_of(task: Path, dtype: str, options: argparse.Namespace, engine: dict[str, Any]) -> Job:
    """The quickstart's model on the two turns."""
    settings = {"dtype": dtype, "max_model_len": 512, "kv_cache_gib": 1, "batch_rows": 8, **engine}
    overrides = [f"engine.{name}={value}" for name, value in settings.items()]
    overrides += [f"task={task}", f"sampling.max_tokens={options.max_tokens}"]
    return load_job(ROOT / "jobs/quickstart.toml", [f"synthesis.{line}" for line in overrides] + PAIRS)


def read_rows(limit: int) -> list[Row]:
    """The first prompts of the quickstart."""
    with open(ROOT / "jobs/quickstart/prompts.jsonl", encoding="utf-8") as file:
        prompts = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in islice(file, limit)]
    return [{"prompt_id": prompt_id(prompt), "prompt": prompt, "extra": "{}"} for prompt in prompts]


def answers(job: Job, rows: list[Row]) -> dict[str, dict[str, str]]:
    """The texts of one run, by turn and row."""
    import ray.data

    written = synthesize(ray.data.from_items(rows, override_num_blocks=1), job).take_all()
    return {turn: {row["prompt_id"]: row[turn] for row in written} for turn in TURNS}


def same(texts: dict[str, str], others: dict[str, str]) -> float:
    """Share of rows with the same text."""
    return sum(texts[row] == others[row] for row in texts) / len(texts)


def compare(dtype: str, options: argparse.Namespace, task: Path) -> dict[str, dict[str, float]]:
    """For each way to run, the share of rows with the text of the first run."""
    rows = read_rows(options.rows)
    runs = {}
    for name, change in VARIANTS.items():
        engine = {key: value for key, value in change.items() if key != "reverse"}
        runs[name] = answers(job_of(task, dtype, options, engine), rows[:: -1 if "reverse" in change else 1])
    first = runs.pop("first run")
    return {name: {turn: same(first[turn], run[turn]) for turn in TURNS} for name, run in runs.items()}


def table(report: dict[str, dict[str, dict[str, float]]]) -> str:
    """The report as text."""
    lines = [f"{'precision':<11}{'against the first run':<24}" + "".join(f"{turn:>9}" for turn in TURNS)]
    for dtype, runs in report.items():
        for name, shares in runs.items():
            lines.append(f"{dtype:<11}{name:<24}" + "".join(f"{shares[turn]:>9.3f}" for turn in TURNS))
    return "\n".join(lines)


def main() -> None:
    """Run all, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "repeat.toml"
        task.write_text(TASK, encoding="utf-8")
        start_ray(job_of(task, "auto", options, {}))
        report = {dtype: compare(dtype, options, task) for dtype in options.dtypes}
    print(table(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
