"""DeepSpeed as the engine of the training loop; the only module that imports it, and only once it is built.

Planning reads from here what ZeRO holds and sends, so the module itself stays light.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rdpo.config import Job, Training, smallest
from rdpo.modeling.model import Policy
from rdpo.modeling.student import student_dtype, student_forward, weights_of_start
from rdpo.tracking.trace import span

if TYPE_CHECKING:
    from rdpo.modeling.layout import Batch
    from rdpo.training.backend import Weights

TAG = "state"
"""The folder in a checkpoint that holds the workers' shards."""
SHARDS = "*zero_pp_rank_*_optim_states.pt"
PERSISTENT = 100_000
"""ZeRO-3 keeps weights of so many elements or fewer whole on every worker (DeepSpeed's own default)."""
BUCKET = 50_000_000
"""Elements that are reduced in one message, and the fewest that are fetched ahead."""
GROUP = 1_000_000_000
"""Elements of one optimizer group (DeepSpeed's own default of `sub_group_size`)."""
LIVE = 1_000_000_000
"""Elements of gathered weights that ZeRO-3 may keep; a smaller model stays whole from forward to backward."""


class DeepSpeedBackend:
    """A policy on a DeepSpeed engine, see `rdpo.training.backend.Backend`."""

    def __init__(self, policy: Policy, engine: Any):
        self.policy, self.engine = policy, engine

    @classmethod
    def build(cls, job: Job, device: torch.device, converted: bool = False) -> DeepSpeedBackend:
        """Load the student; under ZeRO-3 its weights are partitioned while they load.

        DeepSpeed takes the worker's device from Ray Train's environment, not from `device`.
        """
        with span("DeepSpeed is imported"):
            import deepspeed

            _begin(device)
        # Merged or converted while others load partitioned, a model would be partitioned too, and wait for them.
        weights_of_start(job).folder()
        config, partitioned = zero_config(job.training, student_dtype(job), converted), job.training.zero_stage == 3
        with span("student is loaded"), _partitioned_load(config) if partitioned else nullcontext():
            policy = student_forward(job, to_train=True)

        policy.train()
        if job.training.compile_layers:
            policy.compile_layers()
        if job.training.offload_activations and job.training.gpus_per_worker:
            policy.stash = partial(torch.autograd.graph.save_on_cpu, pin_memory=True)
        if partitioned:
            gather_by_layer(policy, config)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        with span("DeepSpeed's engine"):
            return cls(policy, deepspeed.initialize(model=policy, model_parameters=trained, config=config)[0])

    @classmethod
    def read_only(cls, load: Callable[[], Policy], dtype: str, device: torch.device) -> DeepSpeedBackend:
        """Load a policy for its log-probs alone: ZeRO-3 without an optimizer."""
        import deepspeed

        _begin(device)
        config = _read_only_config(dtype)
        with _partitioned_load(config):
            policy = load()
        gather_by_layer(policy, config)
        return cls(policy, deepspeed.initialize(model=policy, config=config)[0])

    def forward(self, batch: Batch) -> torch.Tensor:
        """Summed completion log-probs (S,) in fp32."""
        logps: torch.Tensor = self.engine(batch)
        return logps

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch's loss to those before it."""
        # By hand, since steps differ in their number of micro-batches.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Take the optimizer step if the gradient is finite; its global norm, or infinity."""
        if self.engine.zero_optimization():
            self.engine.step()
            return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else math.inf

        # Without ZeRO, DeepSpeed would take a step that is not finite.
        gradients = [weight.grad for weight in self.policy.parameters() if weight.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.engine.zero_grad()
            return math.inf
        self.engine.step()
        return norm

    def set_lr(self, rate: float) -> None:
        """Use this learning rate from the next step on."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate

    def set_training(self, active: bool) -> None:
        """Switch to training mode, or to evaluation."""
        self.engine.train(active)

    def save(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Write this worker's ZeRO shards; frozen weights are left out."""
        adapted = self.policy.adapted
        self.engine.save_checkpoint(str(folder), tag=TAG, client_state=dict(state), exclude_frozen_parameters=adapted)

    def load(self, folder: Path) -> Mapping[str, Any]:
        """Go on from a checkpoint; the state saved with it."""
        # A checkpoint of an adapter holds no frozen weights, which the model has already.
        strict = not self.policy.adapted
        _, state = self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=strict)
        loaded: Mapping[str, Any] = state
        return loaded

    @staticmethod
    def fits(folder: Path, workers: int) -> bool:
        """Whether so many workers wrote the checkpoint's shards, or it has none (ZeRO stage 0)."""
        return len(list((folder / TAG).glob(SHARDS))) in (0, workers)

    @staticmethod
    def convert(source: Path, target: Path) -> None:
        """Convert a checkpoint by DeepSpeed's Universal Checkpointing (arXiv 2406.18820).

        Raises:
            RuntimeError: DeepSpeed could not; the message ends with what it said.
        """
        module = "deepspeed.checkpoint.ds_to_universal"
        folders = ["--input_folder", str(source / TAG), "--output_folder", str(target / TAG)]
        # A process of its own, for DeepSpeed's converter starts a pool of them.
        command = [sys.executable, "-m", module, *folders, "--inject_missing_state"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr[-2000:]
            raise RuntimeError(f"{source / TAG}: DeepSpeed could not convert this checkpoint: {said}")

    def gathered_state(self) -> dict[str, torch.Tensor]:
        """The trained weights on rank 0's CPU, whatever ZeRO partitioned; empty elsewhere.

        One parameter is gathered at a time, so that no worker ever holds two whole ones.
        """
        import deepspeed

        state = {}
        for name, parameter in self.policy.model.named_parameters():
            if self.policy.adapted and not parameter.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([parameter]):
                if torch.distributed.get_rank() == 0:
                    state[name] = parameter.detach().cpu().clone()
        return state

    @staticmethod
    def name_of(job: Job) -> str:
        """The ZeRO stage that runs."""
        return f"ZeRO-{stage_of(job.training, student_dtype(job))}"

    @staticmethod
    def elements_sent(job: Job, weights: int, trained: int) -> int:
        """Stage 3 gathers every layer for the forward and again for the backward, and scatters the gradients.

        Three times the weights where all are trained (arXiv 1910.02054, section 7.2).
        """
        if stage_of(job.training, student_dtype(job)) < 3:
            return 0
        gathered = weights if weights <= LIVE else 2 * weights
        return gathered + trained

    @staticmethod
    def memory_parts(job: Job, weights: Weights) -> dict[str, int]:
        """Bytes by part on the worker's device, see `_parts`."""
        moved = _offloaded(job.training, stage_of(job.training, student_dtype(job)))
        return {name: amount for name, amount in _parts(job, weights).items() if name not in moved}

    @staticmethod
    def offloaded_parts(job: Job, weights: Weights) -> dict[str, int]:
        """Bytes by part that `training.offload` moves to the CPU."""
        stage = stage_of(job.training, student_dtype(job))
        moved, parts = _offloaded(job.training, stage), _parts(job, weights)
        if "gradients" in moved:
            # There the optimizer finds all of them, and not one group after the other.
            parts["gradients of a step"] = 4 * -(-weights.trained // smallest(job.training.num_workers))
        return {name: parts[name] for name in parts if name in moved}


def _begin(device: torch.device) -> None:
    """Let DeepSpeed take up the process group."""
    import deepspeed

    if device.type == "cpu":
        # Else DeepSpeed compiles, for minutes, a sum over shared memory which only its inference uses.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(auto_mpi_discovery=False)


@contextmanager
def _partitioned_load(config: dict[str, Any]) -> Iterator[None]:
    """Within this context weights are partitioned while they are loaded."""
    from transformers.integrations import HfDeepSpeedConfig

    # transformers looks for such an object, which is forgotten when nobody holds it any more.
    loading = HfDeepSpeedConfig(config)
    yield
    del loading


def _parts(job: Job, weights: Weights) -> dict[str, int]:
    """Bytes by part of one worker (arXiv 1910.02054, section 3): what a stage partitions is divided by the workers."""
    dtype = student_dtype(job)
    stage, size = stage_of(job.training, dtype), getattr(torch, dtype).itemsize
    workers = smallest(job.training.num_workers)
    trained, share = weights.trained, -(-weights.trained // workers)

    parts = {
        "weights": weights.size // (workers if stage == 3 else 1),
        "gathered weights": min(weights.elements, LIVE) * size if stage == 3 else 0,
        "master weights": 4 * share if stage else 0,
        "optimizer state": 8 * (share if stage else trained),
        "buckets": min(BUCKET, trained) * size if stage else 0,
    }
    if stage == 3:
        # They are summed in float32, and the optimizer sees those of a group of weights at a time.
        gradients = {"gradients": 4 * share, "gradients of a step": 4 * min(share, GROUP)}
        return {**parts, **gradients, "gradients of a layer": size * weights.layer}
    gradients = {"gradients": size * (share if stage == 2 else trained), "gradients of a step": 4 * share}
    return {**parts, **(gradients if stage else {"gradients": size * trained})}


def _offloaded(training: Training, stage: int) -> set[str]:
    """The parts of a worker's memory that lie on the CPU instead of its GPU."""
    if training.offload == "none" or not stage or not training.gpus_per_worker:
        return set()
    moved = {"master weights", "optimizer state", "gradients of a step"}
    # Stage 1 has the gradients of a whole step on the GPU.
    moved |= {"gradients"} if stage > 1 else set()
    return moved | {"weights"} if training.offload == "all" and stage == 3 else moved


def zero_config(training: Training, dtype: str, universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration dictionary; `universal`: a checkpoint of another number of workers will be loaded.

    DeepSpeed is told of one micro-batch in a step: the boundary of a step, its learning rate and the scale of its loss
    come with each call.
    """
    stage = stage_of(training, dtype)
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero["reduce_bucket_size"] = BUCKET
    if stage == 3:
        zero |= _partitioning()

    if training.offload != "none" and stage >= 1:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": training.gpus_per_worker > 0}
    if training.offload == "all" and stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": training.gpus_per_worker > 0}

    adamw: dict[str, Any] = {
        "lr": training.learning_rate,
        "weight_decay": training.weight_decay,
        "torch_adam": True,
    }
    if training.gpus_per_worker:
        # One kernel for all weights; offloaded, all cores instead of one.
        adamw["fused"] = True

    config = _engine_config(training, dtype, universal, zero, adamw)
    if stage == 3 and dtype == "bfloat16":
        # Sums of many small gradients in bfloat16 lose those that come last. Stages 1 and 2 keep theirs in another
        # optimizer then, whose checkpoints are not partitioned in the same way.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _partitioning() -> dict[str, Any]:
    """How ZeRO-3 gathers what it has partitioned."""
    return {
        "stage3_gather_16bit_weights_on_model_save": False,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": PERSISTENT,
        "stage3_max_live_parameters": LIVE,
        "stage3_max_reuse_distance": LIVE,
    }


def _read_only_config(dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration dictionary of a policy that is not trained."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": 3, **_partitioning()},
        "steps_per_print": 1 << 30,
    }


def _engine_config(
    training: Training, dtype: str, universal: bool, zero: dict[str, Any], adamw: dict[str, Any]
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "optimizer": {"type": "AdamW", "params": adamw},
        "zero_optimization": zero,
        # DeepSpeed's own optimizer for the CPU is compiled at its first use.
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 1 << 30,
    }


def stage_of(training: Training, dtype: str) -> int:
    """The ZeRO stage that runs: without ZeRO, DeepSpeed would train bfloat16 weights without fp32 master copies."""
    return max(training.zero_stage, 1) if dtype == "bfloat16" else training.zero_stage


def gather_by_layer(policy: Policy, config: dict[str, Any]) -> None:
    """Let ZeRO-3 gather and release a decoder layer as one, not each of its projections and adapters.

    In the `config` it is told to fetch a whole one ahead.

    DeepSpeed's hooks do Python work at every module it follows, and at each release it walks all
    modules up to its reuse distance: with LoRA on every projection a small model spent more time there
    than in its matrices (see jobs/bench/RESULTS.md).
    """
    from deepspeed.utils import set_z3_leaf_modules

    if layers := policy.layer_types():
        set_z3_leaf_modules(policy, layers)
    config["zero_optimization"]["stage3_prefetch_bucket_size"] = layer_elements(policy)


def layer_elements(policy: Policy) -> int:
    """Elements of the largest decoder layer, which is fetched ahead as it is gathered: whole; at least `BUCKET`."""
    kinds = tuple(policy.layer_types())
    layers = (module for module in policy.modules() if isinstance(module, kinds))
    # A partitioned weight has no elements of its own, and says how many it has in all.
    sizes = (sum(getattr(one, "ds_numel", one.numel()) for one in layer.parameters()) for layer in layers)
    return max(BUCKET, max(sizes, default=0))
