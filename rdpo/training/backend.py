"""What the training loop needs of an engine: the seam between the loop and DeepSpeed.

`rdpo.training.deepspeed` is the engine that ships. A second one, of plain torch in one process, drives the loop in its
tests (`tests/support/plain_backend.py`): it shows the least that an engine has to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from rdpo.config import Job
    from rdpo.modeling.layout import Batch
    from rdpo.modeling.model import Policy


@dataclass(frozen=True)
class Weights:
    """What is held of a model whatever the number of workers: elements in all and trained, and bytes of all.

    `layer` is how many trained elements its largest decoder layer has.
    """

    elements: int
    trained: int
    size: int
    layer: int = 0


class Backend(Protocol):
    """An engine with a policy on it, one on every worker; all workers make the same calls in the same order.

    The loop scales the loss of each micro-batch by workers / pairs of the step, so an engine takes the *mean* of the
    gradients over the workers. It clips them to `training.max_grad_norm`; the schedule is the loop's.
    """

    policy: Policy
    """The policy. For the log-probs of one that is trained, call `forward`: an engine may have to gather weights."""

    @classmethod
    def build(cls, job: Job, device: torch.device, converted: bool = False) -> Backend:
        """Load the job's student and make it ready to train, in training mode.

        Args:
            job: its `student` and `training` say all there is to say about it.
            device: this worker's.
            converted: a checkpoint that went through `convert` will be loaded.
        """
        ...

    @classmethod
    def read_only(cls, load: Callable[[], Policy], dtype: str, device: torch.device) -> Backend:
        """Load a policy that is not trained, its weights partitioned over all workers; only `policy` is used of it.

        Every worker calls the policy equally often.

        Args:
            load: loads it, in evaluation mode.
            dtype: its precision.
            device: this worker's.
        """
        ...

    def forward(self, batch: Batch) -> torch.Tensor:
        """What the policy's forward gives: summed completion log-probs (S,) in fp32, or (2, S) with likeness."""
        ...

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch's loss, a scalar, to those before it; `last`: `step` is next."""
        ...

    def step(self) -> float:
        """Take the optimizer step; the global norm of the gradient before it was clipped.

        Infinity where the gradient is not finite: then no weight was changed. The gradient is forgotten in any case.
        """
        ...

    def set_lr(self, rate: float) -> None:
        """Use this learning rate from the next step on."""
        ...

    def set_training(self, active: bool) -> None:
        """Switch to training mode, or to evaluation (no dropout)."""
        ...

    def save(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Write this worker's share of a checkpoint below `folder`, and the loop's own `state`."""
        ...

    def load(self, folder: Path) -> Mapping[str, Any]:
        """Go on from a checkpoint that `fits` this number of workers, or was converted; the state saved with it."""
        ...

    @staticmethod
    def fits(folder: Path, workers: int) -> bool:
        """Whether so many workers can load a checkpoint as it is."""
        ...

    @staticmethod
    def convert(source: Path, target: Path) -> None:
        """Make of a checkpoint one that any number of workers can load. Called once on each node.

        Raises:
            RuntimeError: it cannot be done; the message says why.
        """
        ...

    def gathered_state(self) -> dict[str, torch.Tensor]:
        """What leaves training, whole, on rank 0's CPU: the adapter, or all weights. Empty on other ranks."""
        ...

    @staticmethod
    def name_of(job: Job) -> str:
        """How the engine calls what it does with this job (`ZeRO-3`)."""
        ...

    @staticmethod
    def elements_sent(job: Job, weights: int, trained: int) -> int:
        """Elements of weights and gradients that cross between all workers in one micro-batch.

        0 where they meet only at the end of a step.

        Args:
            job: its `training` says what is spread over the workers.
            weights: elements of the model.
            trained: those of them that are trained.
        """
        ...

    @staticmethod
    def memory_parts(job: Job, weights: Weights) -> dict[str, int]:
        """Bytes by part that one worker holds on its device beside the activations of a micro-batch."""
        ...

    @staticmethod
    def offloaded_parts(job: Job, weights: Weights) -> dict[str, int]:
        """Bytes by part that one worker holds in CPU memory in place of its GPU's."""
        ...


def backend_of(job: Job) -> type[Backend]:
    """The class of the engine that a job trains on; one ships. Loads nothing heavy before it is built."""
    from rdpo.training.deepspeed import DeepSpeedBackend

    return DeepSpeedBackend
