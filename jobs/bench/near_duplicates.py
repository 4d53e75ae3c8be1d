"""What it takes to look for training prompts that nearly repeat a held-out one.

    python jobs/bench/near_duplicates.py [--rows 10000 100000]

Prompts are twenty words out of 5,000 made-up ones; a tenth is held out, and a hundredth of the others repeats a
held-out prompt but for a character at its end. Each size runs alone in its process. Printed are seconds, microseconds
a row, and by how much memory grew.
"""

import argparse
import random
import resource
import string
import subprocess
import sys
import time

WORDS, LENGTH = 5_000, 20


def prompts(count: int) -> list[str]:
    """So many prompts, the same each time."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 9))) for _ in range(WORDS)]
    return [" ".join(draw.choices(words, k=LENGTH)) for _ in range(count)]


def measure(count: int) -> str:
    """The figures of one size as a line."""
    from rdpo.synthesis.near_duplicates import near_duplicates

    texts = prompts(count)
    heldout, others = texts[: count // 10], texts[count // 10 :]
    for place in range(0, len(others), 100):
        others[place] = f"{heldout[place % len(heldout)]}!"

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    used = time.process_time()
    found = near_duplicates(heldout, ((str(place), text) for place, text in enumerate(others)))
    seconds, used = time.monotonic() - began, time.process_time() - used
    grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    missed = len(range(0, len(others), 100)) - len(found)
    return f"{count:>9}{seconds:>9.1f}{used:>12.1f}{1e6 * used / count:>10.0f}{grew:>7} MiB{len(found):>8}{missed:>8}"


def main() -> None:
    """Measure every size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--one", type=int)
    options = parser.parse_args()
    if options.one:
        print(measure(options.one))
        return
    print(
        f"{'rows':>9}{'seconds':>9}{'cpu seconds':>12}{'us a row':>10}{'grew':>11}{'found':>8}{'missed':>8}", flush=True
    )
    for rows in options.rows:
        subprocess.run([sys.executable, __file__, "--one", str(rows)], check=True)


if __name__ == "__main__":
    main()
