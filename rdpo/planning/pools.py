"""Memory of every pool of a job: what each process holds, whether that fits on a GPU, and what would.

Weights are counted on the architecture without numbers, from the configuration alone. A forward is taken as the widest
tensors that it has at the same time: enough to see what fits, not to fill a card to its edge. What an engine has left
is for its key-value cache, of which rows in flight need their share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from rdpo.cluster.gpus import GPUS
from rdpo.cluster.hardware import compute_dtype
from rdpo.cluster.pools import Held, Pool
from rdpo.config import Engine
from rdpo.errors import InputError
from rdpo.modeling.weights import ModelRef
from rdpo.planning.memory import CPU_PROCESS, GIB, GPU_PROCESS
from rdpo.synthesis.engine import GPU_BATCHED_TOKENS, GPU_SEQUENCES
from rdpo.tracking.tables import aligned
from rdpo.training.deepspeed import LIVE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ENGINE_SHARE = 0.92
"""Of a GPU's memory, what vLLM takes where `gpu_memory_utilization` is not given."""
GRAPHS = GIB
"""An engine's CUDA graphs."""
BITS = {"fp8": 8, "fbgemm_fp8": 8, "awq": 4, "gptq": 4, "mxfp4": 4}
"""Bits of a weight by the method it is stored with, where the configuration names no number."""


@dataclass(frozen=True)
class Shape:
    """An architecture's sizes: weight elements in all and their bytes as stored (None: as computed), widths, heads."""

    elements: int
    stored: int | None
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    key_heads: int
    head: int
    latent: int = 0
    """Width of the compressed keys and values of a token, where there are such (DeepSeek's)."""

    def weights(self, dtype: str) -> int:
        """Bytes of all weights."""
        return self.stored or self.elements * getattr(torch, dtype).itemsize

    def token(self, dtype: str, groups: int) -> float:
        """Bytes of one token in the key-value cache of one of `groups` GPUs that split every layer."""
        size: int = getattr(torch, dtype).itemsize
        if self.latent:
            return float(self.layers * self.latent * size)
        # A GPU has a key head at least.
        return self.layers * 2 * max(self.key_heads / groups, 1) * self.head * size

    def forward(self, tokens: int, head_rows: int, dtype: str, groups: int = 1) -> int:
        """Bytes of the widest tensors of one forward: a layer's two inner ones and its states, and logits in float32.

        Logits stand there twice, as they come and as their log-sum-exp needs them.
        """
        size: int = getattr(torch, dtype).itemsize
        states = tokens * (2 * self.inner // groups + 4 * self.hidden) * size
        return max(states, 2 * tokens * self.hidden * size + 2 * 4 * head_rows * self.vocabulary // groups)


@lru_cache(maxsize=32)
def shape_of(model: ModelRef, classifier: bool = False) -> Shape:
    """The sizes of a model, from its configuration.

    Raises:
        InputError: there is no such model, or its architecture cannot be made from its configuration.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = model.config()
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            outline = auto.from_config(config, trust_remote_code=model.trust)
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        raise InputError(f"model {model.name}: {type(error).__name__}: {error}") from None

    text = config.get_text_config()
    elements = sum(weight.numel() for weight in outline.parameters())
    heads = getattr(text, "num_attention_heads", 1)
    return Shape(
        elements=elements,
        stored=_stored_bytes(config, elements),
        layers=getattr(text, "num_hidden_layers", 1),
        hidden=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        key_heads=getattr(text, "num_key_value_heads", None) or heads,
        head=getattr(text, "head_dim", None) or text.hidden_size // heads,
        latent=_latent(text),
    )


def _latent(config: PretrainedConfig) -> int:
    rank = getattr(config, "kv_lora_rank", None)
    return rank + config.qk_rope_head_dim if rank else 0


def _stored_bytes(config: PretrainedConfig, elements: int) -> int | None:
    """Bytes of weights that are stored quantised; None of others, and of a method whose bits are not known here."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    table = found if isinstance(found, dict) else found.to_dict()
    bits = table.get("bits") or BITS.get(table.get("quant_method", ""))
    return int(elements * bits / 8) if bits else None


@dataclass(frozen=True)
class PoolMemory:
    """Bytes by part of one process of a pool; on a GPU of `room` bytes, if its type is known.

    Of an engine, `cache` is what the key-value cache can have, in tokens; `wanted` is what its rows in flight may need,
    and `longest` what one of them may.
    """

    pool: Pool
    parts: dict[str, int] = field(default_factory=dict)
    room: float | None = None
    cache: int | None = None
    wanted: int = 0
    longest: int = 0

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether it fits, as far as is known."""
        if self.room is None:
            return True
        return self.total <= self.room and (self.cache is None or self.cache >= self.longest)

    @property
    def advice(self) -> str:
        """What would fit, or hold more rows; nothing where all is well."""
        name = self.pool.setting
        if not self.fits:
            return f"{name} does not fit: {_remedy(self.pool)}"
        if self.cache is not None and self.cache < self.wanted:
            rows = self.cache // self.longest
            return (
                f"{name}: the cache holds {self.cache:,} tokens, so {rows} of {self.wanted // self.longest} rows in "
                "flight where all are as long as max_model_len; others wait"
            )
        return ""


def _remedy(pool: Pool) -> str:
    if pool.setting.endswith("engine"):
        return "give gpus that split every layer (2, 4, 8), a quantised model, or a smaller max_model_len"
    if any(held.head_rows for held in pool.holds):
        return "give shards, over which the weights are partitioned, or a smaller tokens_per_batch"
    return "give a smaller batch_size or max_length, or a smaller model"


def pool_memory(pool: Pool, gpu: str | None = None) -> PoolMemory:
    """What one process of a pool holds; on GPUs of a type, where it is named and the pool has some.

    Raises:
        InputError: a model cannot be had.
    """
    room = GPUS[gpu].memory_gib * GIB if gpu and pool.gpus else None
    if engine := pool.holds[0].engine:
        return _of_engine(pool, pool.holds[0], engine, room)

    parts = {"process": GPU_PROCESS if pool.gpus else CPU_PROCESS, "weights": 0, "gathered weights": 0, "forward": 0}
    for held in pool.holds:
        shape = shape_of(held.model, classifier=not held.head_rows)
        dtype = compute_dtype(held.dtype, pool.gpus > 0)
        parts["weights"] += shape.weights(dtype) // pool.shards
        if pool.shards > 1:
            parts["gathered weights"] += min(shape.elements, LIVE) * getattr(torch, dtype).itemsize
        # One model after the other reads.
        parts["forward"] = max(parts["forward"], shape.forward(held.tokens, held.head_rows, dtype))
    # A fraction of a GPU is shared with others.
    return PoolMemory(pool, parts, room * pool.gpus if room else None)


def _of_engine(pool: Pool, held: Held, engine: Engine, room: float | None) -> PoolMemory:
    shape, dtype = shape_of(held.model), compute_dtype(held.dtype, pool.gpus > 0)
    gpus = max(engine.gpus, 1)
    groups = gpus // engine.pipeline_parallel
    wanted = engine.rows_in_flight * engine.max_model_len
    parts = {"process": GPU_PROCESS if engine.gpus else CPU_PROCESS, "weights": shape.weights(dtype) // gpus}
    if not engine.gpus:
        return PoolMemory(pool, {**parts, "KV cache": int(engine.kv_cache_gib * GIB)})

    rows = max(GPU_SEQUENCES, engine.rows_in_flight)
    parts["forward"] = shape.forward(GPU_BATCHED_TOKENS, rows, dtype, groups)
    parts["graphs"] = GRAPHS
    if room is None:
        return PoolMemory(pool, parts, wanted=wanted, longest=engine.max_model_len)

    share = engine.options.get("gpu_memory_utilization", ENGINE_SHARE)
    taken = room * (float(share) if isinstance(share, (int, float)) else ENGINE_SHARE)
    left = max(0.0, taken - sum(parts.values()))
    tokens = int(left / (shape.token(dtype, groups) / engine.pipeline_parallel))
    parts["KV cache"] = int(left)
    return PoolMemory(pool, parts, taken, tokens, wanted, engine.max_model_len)


def pool_table(pools: Sequence[Pool], gpu: str | None) -> Iterator[str]:
    """Lines with the memory of one process of every pool that holds a model, and what to do where it does not fit.

    Args:
        pools: those of a job.
        gpu: type of the GPUs, as `GPUS` names it.
    """
    columns = ("weights", "gathered weights", "forward", "KV cache")
    cells = [["GiB of a process", "on", *columns, "other", "total", ""]]
    notes: list[str] = []
    for pool in pools:
        if not pool.holds:
            continue
        try:
            memory = pool_memory(pool, gpu)
        except InputError as error:
            notes.append(f"{pool.setting}: not known ({error})")
            continue
        parts = [memory.parts.get(name, 0) for name in columns]
        other = memory.total - sum(parts)
        limit = f"of {memory.room / GIB:.0f}" if memory.room else ""
        place = ("GPU" if pool.gpus else "CPU") + (f", {pool.shards} shards" if pool.shards > 1 else "")
        cells.append([f"  {pool.setting}", place, *map(_gib, parts), _gib(other), _gib(memory.total), limit])
        notes += [memory.advice] if memory.advice else []
    yield from aligned(cells, right=[2, 3, 4, 5, 6, 7])
    yield from notes


def _gib(amount: float) -> str:
    return f"{amount / GIB:.1f}" if amount else ""
