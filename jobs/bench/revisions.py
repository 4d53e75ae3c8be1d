"""Revision turns with drafts from their conversation and without: a table, and as the last line one JSON object.

    python jobs/bench/revisions.py [--repetitions 3] [--rows 32] [--draft 8] [--match 4]

`copies`: paragraphs of this repository's documents with small faults, to be written once more without them. `task`: the
quickstart's own three turns, which copy little. Each engine has its own process, one after the other, without and with
drafts in turn; the time to start it does not count. Greedy, in float32, so that `same` texts can be counted.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from rdpo.config import Engine as EngineSettings
from rdpo.config import Job, Sampling, load_job
from rdpo.config.task import Turn
from rdpo.modeling.chat import student_chat
from rdpo.modeling.weights import ModelRef
from rdpo.records import Messages, prompt_id
from rdpo.synthesis.asking import ask
from rdpo.synthesis.engine import Engine, Generation
from rdpo.synthesis.instructions import load_task
from rdpo.synthesis.lookup import DRAFT, MATCH
from rdpo.synthesis.teacher import Conversation

ROOT = Path(__file__).parents[2]
KINDS = ("copies", "task")
PARAGRAPH = (300, 900)
"""Characters of a text to copy."""
WORDS_PER_FAULT = 25
ASKED = "Correct the spelling of this text. Write the whole text again and change nothing else.\n\n{text}"
COUNTERS = {"drafted": "vllm:spec_decode_num_draft_tokens", "accepted": "vllm:spec_decode_num_accepted_tokens"}


def paragraphs() -> list[str]:
    """Plain paragraphs of the documents, in a fixed order."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "jobs/README.md"]
    found = []
    for file in files:
        for part in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")):
            text = " ".join(part.split())
            if PARAGRAPH[0] <= len(text) <= PARAGRAPH[1] and text[0].isalpha() and "|" not in text:
                found.append(text)
    return found


def with_faults(text: str) -> str:
    """The text with two letters of some words exchanged, the same ones each time."""
    draw, words = random.Random(text), text.split()
    for place in draw.sample(range(len(words)), max(1, len(words) // WORDS_PER_FAULT)):
        word = words[place]
        if len(word) > 3:
            words[place] = word[:1] + word[2] + word[1] + word[3:]
    return " ".join(words)


def job_of(options: argparse.Namespace, drafts: bool) -> Job:
    """The quickstart's model on an engine with or without drafts."""
    job = load_job(ROOT / "jobs/quickstart.toml", [])
    config = {"method": "ngram", "num_speculative_tokens": options.draft}
    config |= dict.fromkeys(("prompt_lookup_min", "prompt_lookup_max"), options.match)
    # As `rdpo.synthesis.lookup` has it, with lengths of one's own.
    engine = EngineSettings(
        max_model_len=1024,
        kv_cache_gib=2,
        dtype="float32",
        options={"disable_log_stats": False, **({"speculative_config": config} if drafts else {})},
    )
    sampling = Sampling(temperature=0.0, max_tokens=320 if options.kind == "copies" else 96)
    return job.model_copy(
        update={"synthesis": job.synthesis.model_copy(update={"engine": engine, "sampling": sampling})}
    )


class Asked:
    """An engine that counts the seconds and tokens of what it is asked."""

    def __init__(self, job: Job):
        self.job, self.chat = job, student_chat(job)
        self.engine = Engine(str(ModelRef.student(job).folder()), job.synthesis.engine, job.seed)
        self.tokens = 0

    async def say(self, messages: Messages, turn: Turn, sampling: Sampling, seed: int) -> Generation:
        """One answer."""
        said = await ask(self.engine, self.chat, messages, sampling, seed, turn.prefill)
        self.tokens += said.tokens
        return said


async def copies(asked: Asked, rows: int) -> list[str]:
    """The texts, corrected."""
    turn, sampling = Turn(name="revision"), asked.job.synthesis.sampling
    questions = [ASKED.format(text=with_faults(text)) for text in paragraphs()[:rows]]
    said = [asked.say([{"role": "user", "content": text}], turn, sampling, 0) for text in questions]
    return [one.text for one in await asyncio.gather(*said)]


async def task(asked: Asked, rows: int) -> list[str]:
    """The last answers of the quickstart's task."""
    job, turns = asked.job, load_task(asked.job.synthesis.task or "")
    # Turns with a temperature of their own would be other draws with drafts: right too, and not to be counted.
    greedy = [turn.model_copy(update={"temperature": None}) for turn in turns.turns]
    turns = turns.model_copy(update={"turns": greedy})
    converse = Conversation(job, turns, job.synthesis.sampling, asked.say)
    with open(ROOT / "jobs/quickstart/prompts.jsonl", encoding="utf-8") as file:
        raw = [json.loads(line) for line in islice(file, rows)]
    prompts = [([{"role": "user", "content": one.pop("prompt")}], one) for one in raw]
    spoken = [
        converse({"prompt_id": prompt_id(prompt), "prompt": prompt, "extra": json.dumps(extra)})
        for prompt, extra in prompts
    ]
    return [str(row.get(turns.turns[-1].name)) for row in await asyncio.gather(*spoken)]


async def one(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one engine."""
    asked = Asked(job_of(options, options.one == "on"))
    # Kernels and caches are warm then.
    await asked.say([{"role": "user", "content": "Say hello."}], Turn(name="x"), Sampling(max_tokens=8), 0)
    asked.tokens, began = 0, time.perf_counter()
    texts = await (copies if options.kind == "copies" else task)(asked, options.rows)
    seconds = time.perf_counter() - began
    found = {"tokens": asked.tokens, "seconds": seconds, "rate": asked.tokens / seconds, "texts": texts, **counted()}
    asked.engine.shutdown()
    return found


def counted() -> dict[str, float]:
    """Tokens that were drafted, and those of them that the model would have written too."""
    from vllm.v1.metrics.reader import Counter, get_metrics_snapshot

    values = {metric.name: metric.value for metric in get_metrics_snapshot() if isinstance(metric, Counter)}
    return {name: float(values.get(counter, 0)) for name, counter in COUNTERS.items()}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Both engines, as often as is asked for; medians, and the texts that are the same."""
    found: dict[str, Any] = {}
    given = [f"--{name}={getattr(options, name)}" for name in ("rows", "draft", "match")]
    for kind in options.kinds:
        runs: dict[str, list[dict[str, Any]]] = {"off": [], "on": []}
        for _ in range(options.repetitions):
            for mode in runs:
                command = [sys.executable, __file__, "--one", mode, "--kind", kind, *given]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-3000:])
                runs[mode].append(json.loads(done.stdout.splitlines()[-1]))
        off, on = runs["off"][0]["texts"], runs["on"][0]["texts"]
        ratios = [with_["rate"] / without["rate"] for without, with_ in zip(runs["off"], runs["on"], strict=True)]
        first = runs["on"][0]
        found[kind] = {
            "off": median(run["rate"] for run in runs["off"]),
            "on": median(run["rate"] for run in runs["on"]),
            "ratios": ratios,
            "ratio": median(ratios),
            "tokens": first["tokens"],
            "drafted": first["drafted"],
            "accepted": first["accepted"],
            "same": sum(one == other for one, other in zip(off, on, strict=True)),
            "rows": len(on),
        }
    return found


def table(found: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{'turns':<9}{'tokens/s':>10}{'with':>9}{'ratio':>8}{'written':>9}{'drafted':>9}{'accepted':>10}{'same':>12}"
    ]
    for kind, row in found.items():
        same = f"{row['same']} of {row['rows']}"
        share = row["accepted"] / row["drafted"] if row["drafted"] else 0
        line = f"{kind:<9}{row['off']:>10.1f}{row['on']:>9.1f}{row['ratio']:>8.2f}{row['tokens']:>9}"
        lines.append(f"{line}{row['drafted']:>9.0f}{share:>10.2f}{same:>12}")
    return "\n".join(lines)


def main() -> None:
    """Compare, or be one of those compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--draft", type=int, default=DRAFT, help="tokens of a draft at most")
    parser.add_argument("--match", type=int, default=MATCH, help="tokens that must stand earlier")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--one", choices=("on", "off"), help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, default="copies", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asyncio.run(one(options))))
        return
    found = compare(options)
    print(table(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
