"""The peak memory that `rdpo plan` predicts for a case of gpu.py, by part; needs no GPU, and the model's shape alone.

    python jobs/bench/predict_memory.py PAIRS.jsonl TOKENIZER_FOLDER --case "8b LoRA, 8k" [--steps N]

The pairs are those that the case trains on in so many steps. What gpu.py measures is without the `process`, which
torch's allocator does not know of.
"""

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path

from contender import bench_row, job_of, options_from
from gpu import CASES, contender_options
from random_model import write_shape

from rdpo.config import Job
from rdpo.modeling.chat import load_chat
from rdpo.modeling.packing import PairSize
from rdpo.modeling.weights import ModelRef
from rdpo.planning.memory import GIB, rehearse, worker_memory
from rdpo.preference.reference import pair_size, tokenize_pair
from rdpo.records import alive


def sizes_of(job: Job, path: Path, limit: int) -> list[PairSize]:
    """Tokens of the first pairs that fit."""
    chat = load_chat(ModelRef.student(job), job.date)
    with path.open(encoding="utf-8") as file:
        rows = (bench_row(index, json.loads(line)) for index, line in enumerate(file))
        fitting = filter(alive, (tokenize_pair(row, chat, job.reference.max_length) for row in rows))
        return [pair_size(row) for row in islice(fitting, limit)]


def main() -> None:
    """Print the parts and their sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("--case", choices=list(CASES), required=True)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as model:
        write_shape(CASES[options.case].shape, options.tokenizer, model)
        # A folder without weights is refused; these are never read.
        (Path(model) / "model.safetensors").touch()
        settings = contender_options(CASES[options.case], model, options.steps)
        job = job_of(options_from(["rdpo", str(options.pairs), "--dtype", "bfloat16", *settings]))
        on_gpu = {"training": job.training.model_copy(update={"gpus_per_worker": 1})}
        job = job.model_copy(update=on_gpu)
        sizes = sizes_of(job, options.pairs, options.steps * job.training.batch_size)
        parts = worker_memory(job, rehearse(job, sizes))

    for name, size in parts.items():
        print(f"{name:<24}{size / GIB:>8.2f} GiB")
    allocated = sum(parts.values()) - parts["process"]
    print(f"{'all but the process':<24}{allocated / GIB:>8.2f} GiB")


if __name__ == "__main__":
    main()
