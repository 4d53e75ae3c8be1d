"""The whole comparison with TRL on one GPU, in one call: a table for each case, and one JSON object at the end.

    python jobs/bench/gpu.py PAIRS.jsonl TOKENIZER_FOLDER [--case NAME] [--steps N] [options of contender.py]

Needs rdpo's training dependencies and TRL, not Ray or vLLM. The models have random weights in real shapes, so
nothing is downloaded. In full fine-tuning rdpo keeps fp32 master weights, TRL trains the bfloat16 ones: its
memory and losses there are not like for like. The case `trial` is small enough for a CPU and shows that the script
runs.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from random_model import write_random_model
from training import TRAINERS, WORKLOADS, compare, table


@dataclass(frozen=True)
class Case:
    """A model's shape and how it is trained; `tokens` is the budget of one forward of either trainer."""

    shape: str
    tokens: int
    batch: int
    options: tuple[str, ...] = ()


CASES = {
    "trial": Case("tiny", 2048, 4),
    "1b full, 4k": Case("1b", 4096, 32),
    "1b full, 16k": Case("1b", 16_384, 64),
    "8b LoRA, 8k": Case("8b", 8192, 32, ("--lora", "16")),
    "8b LoRA, 8k, checkpointing": Case("8b", 8192, 32, ("--lora", "16", "--gradient-checkpointing")),
    "8b LoRA, 64k, checkpointing": Case("8b", 65_536, 64, ("--lora", "16", "--gradient-checkpointing")),
    "8b LoRA, 16k": Case("8b", 16_384, 32, ("--lora", "16", "--gradient-checkpointing")),
}
MAX_LENGTH = 1024


def contender_options(case: Case, model: str, steps: int) -> list[str]:
    """Options of `contender.py`: TRL's forward gets as many pairs as fit into the same budget when padded."""
    length = min(MAX_LENGTH, case.tokens // 2)
    budget = {"--tokens-per-batch": case.tokens, "--max-length": length, "--micro": case.tokens // (2 * length)}
    sizes = {"--model": model, "--steps": steps, "--batch-size": case.batch, **budget}
    return [*(str(part) for item in sizes.items() for part in item), *case.options]


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="only these; by default all")
    parser.add_argument("--trainer", action="append", choices=TRAINERS, help="only these; by default both")
    options, more = parser.parse_known_args()
    reports = {}
    for name in options.case or [name for name in CASES if name != "trial"]:
        with tempfile.TemporaryDirectory() as model:
            write_random_model(CASES[name].shape, options.tokenizer, model)
            settings = [*contender_options(CASES[name], model, options.steps), *more]
            reports[name] = compare(options.pairs, settings, options.workload, options.trainer)
        print(f"\n{name}\n{table(reports[name])}", flush=True)
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
