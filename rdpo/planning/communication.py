"""What training sends, beside what there is to compute: how far a number of workers is worth its price.

A micro-batch gathers weights and scatters gradients, all in two bytes; how many, the training's engine says
(`Backend.elements_sent`). That does not depend on the number of workers, but the work between two such rounds does: a
step's pairs are shared among them. How much is sent while products run is not predicted; the step lies between all of
it and none. `jobs/bench/scale.py` holds this against published figures.
"""

from __future__ import annotations

from dataclasses import dataclass

from rdpo.cluster.gpus import Gpu

BYTES = 2
REACHED = 0.8
"""Share of the links' rate that collectives of this size reach."""


@dataclass(frozen=True)
class Sent:
    """Seconds that one worker's micro-batch takes: of products, and of weights and gradients on their way."""

    products: float
    messages: float

    @property
    def range(self) -> tuple[float, float]:
        """Seconds if all is sent while products run, and if nothing is."""
        return max(self.products, self.messages), self.products + self.messages


def bytes_sent(elements: int, workers: int) -> float:
    """Bytes that each of the workers takes in for one micro-batch in which so many elements are sent."""
    return BYTES * elements * (workers - 1) / workers


def sent(flops: float, elements: int, workers: int, gpu: Gpu, reached_flops: float) -> Sent:
    """A micro-batch of `flops` on each of so many workers, which sends `elements` of weights and gradients.

    `reached_flops` is the FLOP/s of products that wait for nothing.
    """
    messages = bytes_sent(elements, workers) / (REACHED * gpu.arriving(workers))
    return Sent(flops / reached_flops, messages)
