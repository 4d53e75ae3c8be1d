"""The synthesis stage against three other ways to speak the same turns: a table, and as the last line one JSON object.

    python jobs/bench/synthesis.py [--contender NAME] [options of speaker.py]

Each contender has its own process, one after the other. Seconds are those with all engines up: from the first row
entering the first turn to the last row coming out of the last; `all s` is the whole process, starting included.
`load` is the machine's load average of the last five minutes: figures compare only where nothing else ran.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

HERE = Path(__file__).parent
CONTENDERS = ("raw", "inline", "barriers", "raydata", "rdpo")
BASES = ("raw", "raydata")
SAMPLE_S = 5.0


def tree_gib(root: psutil.Process) -> float:
    """Memory of a process and all below it in GiB, shared pages divided among those who share them."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / (1 << 30)


def watch_memory(process: subprocess.Popen, samples: list[float]) -> None:
    """Sample the memory of a contender until it ends."""
    root = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            samples.append(tree_gib(root))
        except psutil.Error:
            return
        time.sleep(SAMPLE_S)


def run(contender: str, options: list[str]) -> dict:
    """One contender's figures."""
    command = [sys.executable, str(HERE / "speaker.py"), contender, *options]
    began, samples = time.monotonic(), [0.0]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    threading.Thread(target=watch_memory, args=(process, samples), daemon=True).start()
    output, errors = process.communicate()
    found = [line for line in output.splitlines() if line.startswith('{"speaker"')]
    if process.returncode or not found:
        sys.exit(f"{' '.join(command)} failed:\n{errors[-3000:]}")
    load = os.getloadavg()[1]
    whole = {"all_seconds": time.monotonic() - began, "peak_gib": max(samples), "load": load}
    figures = {**json.loads(found[-1]), **whole}
    shown = {name: value for name, value in figures.items() if name != "texts"}
    print(json.dumps(shown), file=sys.stderr, flush=True)
    return figures


def compare(results: dict[str, dict]) -> dict[str, dict]:
    """The figures with their ratios, and in place of the last texts how many of them are the same as raw's."""
    texts = {name: figures.pop("texts") for name, figures in results.items()}
    for name, figures in results.items():
        for base in BASES:
            ratio = base in results and figures["tokens_per_second"] / results[base]["tokens_per_second"]
            figures[f"ratio_to_{base}"] = ratio or None
        same = "raw" in texts and sum(texts["raw"].get(row) == text for row, text in texts[name].items())
        figures["same_as_raw"] = same if "raw" in texts else None
    return results


def cell(value: float | None, style: str, width: int) -> str:
    """A number, or a dash where there is none."""
    return f"{'-' if value is None else format(value, style):>{width}}"


def table(results: dict[str, dict]) -> str:
    """The figures as text."""
    turns = list(next(iter(results.values()))["prefix_hits"])[1:]
    head = f"{'contender':<10}{'tokens':>8}{'seconds':>9}{'tokens/s':>10}{'/ raw':>7}{'/ raydata':>11}"
    head += "".join(f"{turn + ' hits':>15}" for turn in turns)
    lines = [f"{head}{'all s':>8}{'peak GiB':>10}{'load':>6}{'same as raw':>13}"]
    for name, row in results.items():
        line = f"{name:<10}{row['tokens']:>8}{row['seconds']:>9.1f}{row['tokens_per_second']:>10.1f}"
        line += cell(row["ratio_to_raw"], ".2f", 7) + cell(row["ratio_to_raydata"], ".2f", 11)
        line += "".join(cell(row["prefix_hits"][turn], ".2f", 15) for turn in turns)
        line += f"{row['all_seconds']:>8.0f}{row['peak_gib']:>10.2f}{row['load']:>6.1f}"
        lines.append(line + cell(row["same_as_raw"], "d", 6) + f" of {row['rows']:>3}")
    return "\n".join(lines)


def main() -> None:
    """Run the contenders, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", action="append", choices=CONTENDERS, help="only these; by default all")
    chosen, options = parser.parse_known_args()
    results = compare({name: run(name, options) for name in chosen.contender or CONTENDERS})
    print(table(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
