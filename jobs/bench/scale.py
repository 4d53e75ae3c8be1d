"""ZeRO-3 at scale, on paper: what is sent beside what is computed; and how that fits published figures.

    python jobs/bench/scale.py

Nothing is run. The first table holds the model of `rdpo.planning.communication` against MosaicML's measurements of
pretraining under full sharding (llm-foundry, scripts/train/benchmarking, H100 80GB and A100 40/80GB tables): the same
messages, since FSDP's full sharding gathers and scatters as ZeRO-3 does. One number is fitted for each GPU type, the
utilisation of products that wait for nothing.

Products and messages both grow with the weights, so the student's size cancels: what decides is how many tokens a
worker has between two rounds of messages. The second table says what share of its speed a worker keeps, and how many
pairs of 1,000 tokens a step must have for that.
"""

from dataclasses import dataclass

from rdpo.cluster.gpus import GPUS
from rdpo.planning.communication import sent

UNHINDERED = {"H100": 0.58, "A100": 0.70, "A100-40": 0.70}
"""Hardware FLOPs utilisation of the published runs that send least for what they compute."""
WEIGHTS = 8.0e9
TOKENS = (512, 1024, 2048, 4096, 8192, 16_384)
WORKERS = (8, 64, 512)
PAIR_TOKENS = 1000


@dataclass(frozen=True)
class Published:
    """A measured run: weights, tokens of a worker's micro-batch, whether forward is computed again, and its HFU."""

    gpu: str
    workers: int
    weights: float
    tokens: int
    again: bool
    measured: float


PUBLISHED = (
    Published("H100", 64, 64.86e9, 8 * 2048, True, 0.5676),
    Published("H100", 32, 64.86e9, 2 * 2048, True, 0.4820),
    Published("H100", 32, 29.98e9, 14 * 2048, True, 0.5857),
    Published("H100", 16, 29.98e9, 10 * 2048, True, 0.5742),
    Published("H100", 8, 29.98e9, 3 * 2048, True, 0.5082),
    Published("H100", 64, 12.85e9, 2 * 2048, False, 0.3986),
    Published("H100", 8, 12.85e9, 2 * 2048, False, 0.3979),
    Published("A100", 64, 64.86e9, 8 * 2048, True, 0.7110),
    Published("A100", 32, 64.86e9, 2 * 2048, True, 0.6475),
    Published("A100-40", 128, 64.86e9, 4 * 2048, True, 0.6521),
    Published("A100-40", 64, 64.86e9, 2 * 2048, True, 0.4782),
    Published("A100-40", 128, 29.98e9, 6 * 2048, True, 0.6966),
    Published("A100-40", 128, 12.85e9, 16 * 2048, True, 0.6924),
    Published("A100-40", 128, 6.66e9, 18 * 2048, True, 0.6685),
)


def beside_measured(run: Published) -> str:
    """A measured utilisation beside the range that the model gives."""
    gpu, best = GPUS[run.gpu], UNHINDERED[run.gpu]
    flops = (8 if run.again else 6) * run.weights * run.tokens
    cost = sent(flops, 3 * int(run.weights), run.workers, gpu, best * gpu.flops)
    high, low = (flops / seconds / gpu.flops for seconds in cost.range)
    beyond = max(low - run.measured, run.measured - high, 0.0)
    verdict = "inside" if not beyond else f"{beyond:.3f} outside"
    return (
        f"{run.gpu:<9}{run.workers:>5}{run.weights / 1e9:>8.1f}B{run.tokens:>8}{low:>9.3f} to {high:.3f}"
        f"{run.measured:>10.3f}   {verdict}"
    )


def kept(gpu: str, tokens: int, workers: int, lora: bool) -> str:
    """The share of its unhindered speed that a worker keeps, if nothing is sent while products run, and if all is."""
    flops, trained = (4 if lora else 6) * WEIGHTS * tokens, 0 if lora else int(WEIGHTS)
    cost = sent(flops, 2 * int(WEIGHTS) + trained, workers, GPUS[gpu], UNHINDERED[gpu] * GPUS[gpu].flops)
    best, worst = (cost.products / seconds for seconds in cost.range)
    return f"{worst:.2f} to {best:.2f}"


def main() -> None:
    """Print both tables."""
    print(f"{'GPU':<9}{'GPUs':>5}{'weights':>9}{'tokens':>8}{'HFU predicted':>18}{'measured':>12}")
    print("\n".join(beside_measured(run) for run in PUBLISHED))
    for gpu in ("H100", "A100"):
        columns = "".join(f"{count:>10} GPUs{'pairs':>8}" for count in WORKERS)
        print(f"\n{gpu}: tokens of a worker's micro-batch{columns}")
        for tokens in TOKENS:
            cells = ((kept(gpu, tokens, count, False), -(-tokens * count // PAIR_TOKENS)) for count in WORKERS)
            print(f"{tokens:>35}" + "".join(f"{share:>15}{pairs:>8,}" for share, pairs in cells))


if __name__ == "__main__":
    main()
