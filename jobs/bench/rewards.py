"""How fast a reward model scores K answers to each prompt: packed rows against padded ones and plain transformers.

    python jobs/bench/rewards.py [--answers 2 8] [--rows 24] [--repeat 3] [--layers 6] [--width 384]
                                 [--dtype auto] [--gpu]

The reward model is a random decoder with a head on its last token. Prompts have 300 to 800 tokens, answers 40 to 160.
Each way runs alone in its process, one after the other, several times. Printed are rows a second, the most memory
beyond that of the model, how many times plain transformers' rate that is, and the largest difference from the model
called with one conversation alone. By default the precision is what a run takes on this machine; in bfloat16 two ways
of computing a score part by its rounding, so that `off` means something with `--dtype float32` alone.

`transformers` is what a plain program does: batches of 16 conversations as they come, padded to the longest.
"""

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

WAYS = ("transformers", "padded", "packed")
PROMPT, ANSWER = (300, 800), (40, 160)
BATCH = 16
GIB = 1 << 30
RESET_PEAK = "5"
"""What Linux is told to count the most memory of a process anew."""
FIGURES = ("rate", "memory", "off")
CHECKED = 4
"""Rows whose scores are held against the model called alone."""


def made_rows(count: int, answers: int) -> list[dict[str, Any]]:
    """Rows with a prompt and so many answers, the same each time; a byte is a token."""
    draw = random.Random(0)

    def text(bounds: tuple[int, int]) -> str:
        return "".join(draw.choices("abcdefghij klmno", k=draw.randint(*bounds)))

    rows = []
    for number in range(count):
        row: dict[str, Any] = {"prompt_id": str(number), "prompt": [{"role": "user", "content": text(PROMPT)}]}
        rows.append(row | {f"a{place}": text(ANSWER) for place in range(answers)})
    return rows


def save_reward_model(folder: str, layers: int, width: int) -> None:
    """A random Llama with a head, and a tokenizer of bytes."""
    import torch
    from transformers import LlamaForSequenceClassification

    from tests.support.models import byte_tokenizer, save_model, tiny_config

    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    config = tiny_config(tokenizer, **sizes, **heads, num_labels=1, max_position_embeddings=2048)
    torch.manual_seed(0)
    save_model(folder, LlamaForSequenceClassification(config), tokenizer)


def measure(way: str, folder: str, count: int, answers: int, dtype: str, gpu: bool) -> dict[str, float]:
    """Seconds for all rows by one way, most memory in GiB, and the largest difference from single conversations."""
    from rdpo.config import ClassifierReward
    from rdpo.preference.rewards.classifier import Classifier

    names = [f"a{place}" for place in range(answers)]
    layout = "padded" if way == "padded" else "auto"
    settings = {"kind": "classifier", "name": "rm", "model": folder, "gpus": int(gpu), "layout": layout, "dtype": dtype}
    actor = Classifier(ClassifierReward.model_validate({**settings, "batch_size": BATCH, "max_length": 2048}), names)
    rows = made_rows(count, answers)
    scores = _plain if way == "transformers" else _by_actor
    scores(actor, rows[:2], names)

    before = _memory_now(gpu)
    began = time.monotonic()
    found = scores(actor, rows, names)
    seconds = time.monotonic() - began
    memory = _most_memory(gpu) - before
    single = [_alone(actor, row, names) for row in rows[:CHECKED]]
    off = max(abs(a - b) for one, other in zip(found, single, strict=False) for a, b in zip(one, other, strict=True))
    return {"rate": count / seconds, "memory": memory, "off": off}


def _memory_now(gpu: bool) -> float:
    """Memory in use in GiB; the most from now on is counted from here."""
    import torch

    gc.collect()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / GIB
    # What is free goes back to the system, so that all that is taken again is seen.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")
    return _status("VmRSS")


def _most_memory(gpu: bool) -> float:
    import torch

    return torch.cuda.max_memory_allocated() / GIB if gpu else _status("VmHWM")


def _status(name: str) -> float:
    """A line of this process's status (kB) in GiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / GIB


def _by_actor(actor: Any, rows: list[dict[str, Any]], names: list[str]) -> list[list[float]]:
    import pyarrow as pa

    found = actor(pa.Table.from_pylist(rows)).to_pylist()
    return [[row[f"{name}_scores"]["rm"] for name in names] for row in found]


def _plain(actor: Any, rows: list[dict[str, Any]], names: list[str]) -> list[list[float]]:
    """Batches of conversations as they come, filled up on the right, through the model's own call."""
    import torch

    encoded = [actor.input_ids(row["prompt"], row[name])["input_ids"] for row in rows for name in names]
    flat: list[float] = []
    actor.model.set_attn_implementation("sdpa")
    for start in range(0, len(encoded), BATCH):
        batch = encoded[start : start + BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([one + [actor.pad_id] * (longest - len(one)) for one in batch], device=actor.device)
        mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in batch], device=actor.device)
        with torch.inference_mode():
            hidden = actor.model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            last = torch.tensor([len(one) - 1 for one in batch], device=actor.device)
            flat += actor.model.score(hidden[torch.arange(len(batch)), last])[:, 0].float().tolist()
    return [flat[start : start + len(names)] for start in range(0, len(flat), len(names))]


def _alone(actor: Any, row: dict[str, Any], names: list[str]) -> list[float]:
    import torch

    actor.model.set_attn_implementation("eager")
    found = []
    for name in names:
        ids = torch.tensor([actor.input_ids(row["prompt"], row[name])["input_ids"]], device=actor.device)
        with torch.inference_mode():
            hidden = actor.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
            found.append(actor.model.score(hidden)[0, 0].float().item())
    return found


def main() -> None:
    """Measure every way in a process of its own, in turn; print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        way, folder, answers = given.one.split(",")
        print(json.dumps(measure(way, folder, given.rows, int(answers), given.dtype, given.gpu)))
        return

    with tempfile.TemporaryDirectory() as folder:
        save_reward_model(folder, given.layers, given.width)
        print(f"{given.layers} layers of {given.width}, {given.rows} prompts of {PROMPT[0]} to {PROMPT[1]} tokens")
        print(f"{'answers':>7}  {'way':<12}  {'rows/s':>7}  {'times plain':>11}  {'GiB':>6}  off")
        for answers in given.answers:
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(given.repeat):
                for way in WAYS:
                    found[way].append(_in_process(way, folder, answers, given))
            for way in WAYS:
                rate, memory, off = (statistics.median(one[key] for one in found[way]) for key in FIGURES)
                beside = zip(found[way], found["transformers"], strict=True)
                times = statistics.median(one["rate"] / plain["rate"] for one, plain in beside)
                print(f"{answers:>7}  {way:<12}  {rate:>7.2f}  {times:>11.2f}  {memory:>6.2f}  {off:.1e}", flush=True)


def _in_process(way: str, folder: str, answers: int, given: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", f"{way},{folder},{answers}", "--rows", str(given.rows)]
    command += ["--dtype", given.dtype]
    command += ["--gpu"] if given.gpu else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    result: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
