"""Models, how answers are drawn from them, and the engines and servers that run them."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

from rdpo.config.section import (
    MEMORY,
    PLACEMENT,
    UNSAID,
    Address,
    Concurrency,
    Dtype,
    Section,
    TemplateArguments,
    largest,
    smallest,
)

GPU_BATCH_ROWS, CPU_BATCH_ROWS = 64, 16

MEMORY_OPTIONS = frozenset(
    {
        *("gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb", "swap_space"),
        *("max_num_seqs", "max_num_batched_tokens", "enforce_eager"),
    }
)
"""Arguments of vLLM's that are like fields with the mark MEMORY."""


ALWAYS_SAID = frozenset({"temperature", "top_p", "max_tokens", "max_reasoning_tokens"})
"""Fields of `Sampling` that every answer is drawn with, set or not."""


class Student(Section):
    """The model to align. It is also the reference, and its tokenizer renders the training data."""

    model: Address
    """Folder, address of a folder in an object store (`s3://…`), hub id (`owner/name`), `.gguf` file, or
    `package:NAME/FILE` inside an installed package."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; by default its main branch."""
    dtype: Dtype = "auto"
    """Precision of the forward of reference and training; `auto`: bfloat16 on GPUs and on CPUs that multiply in it,
    else float32. The published weights keep the model's own."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: the frozen weights under a LoRA adapter in 4 bits (QLoRA, arXiv 2305.14314), in training and reference;
    the adapter is merged into the unquantised weights. KL compares those with the quantised reference, so that it is
    not 0 even without training. Needs `training.lora`, ZeRO stage 2 or lower, bitsandbytes."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless the job file says so."""
    chat_template_kwargs: Annotated[TemplateArguments, UNSAID] = Field(default_factory=dict)
    """Further arguments of its chat template, as `{ reasoning_effort = "low" }`; those that it does not read are
    refused."""
    adapter: Annotated[Address | None, UNSAID] = None
    """A LoRA adapter on the model, of supervised fine-tuning for example: a folder, an address in an object store, or a
    hub id. The student is then the model with the adapter, wherever a job says student: in training and its reference,
    and as teacher, judge or start of the evaluation. A tokenizer or chat template that lies beside the adapter is the
    student's. An adapter that was trained on another model is refused."""
    adapter_use: Annotated[Literal["merge", "continue"], UNSAID] = "merge"
    """`merge`: the adapter is merged into the model, rounded to the precision that the model is stored in; training
    changes all weights, or puts a new adapter (`training.lora`) on them. `continue`: training goes on with this
    adapter, and the one that is published is for the model itself. Its rank, alpha and modules are the adapter's;
    leave `training.lora` out, or let it say the same (its `dropout` is then used)."""

    @property
    def continues(self) -> bool:
        """Whether training goes on with the adapter that the student has."""
        return self.adapter is not None and self.adapter_use == "continue"

    @property
    def described(self) -> str:
        """The model, and the adapter on it, for a person."""
        return f"{self.model} with {self.adapter}" if self.adapter else self.model

    @model_validator(mode="after")
    def _check_adapter(self) -> Student:
        if self.adapter is None and self.adapter_use != "merge":
            raise ValueError(f"adapter_use = {self.adapter_use!r}: there is no adapter; name one, or remove this")
        if self.adapter and self.quantization != "none":
            raise ValueError(
                f"adapter: weights in four bits ({self.quantization}) cannot take an adapter in exactly; "
                'give quantization = "none", or the model with the adapter merged into it as student.model'
            )
        return self


class Sampling(Section):
    """How answers are drawn from a model."""

    temperature: float = Field(default=0.7, ge=0)
    """What the logits are divided by before a token is drawn; 0 is greedy decoding."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: keep the smallest set of tokens with this total probability. Below 1 the vocabulary is
    sorted at every step, which costs a CPU about a quarter of its speed."""
    max_tokens: int = Field(default=512, ge=1)
    """Most tokens of one answer; one that reaches them is cut off and marked `finish_reason = "length"`."""
    top_k: Annotated[int, UNSAID] = Field(default=0, ge=0)
    """Draw among so many likeliest tokens alone; 0: among all."""
    min_p: Annotated[float, UNSAID] = Field(default=0.0, ge=0, le=1)
    """Leave out tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, UNSAID] = Field(default=1.0, gt=0)
    """What the logits of tokens are divided by (negative ones multiplied) that the conversation or the answer has."""
    presence_penalty: Annotated[float, UNSAID] = Field(default=0.0, ge=-2, le=2)
    """What is taken from the logits of tokens that the answer has."""
    frequency_penalty: Annotated[float, UNSAID] = Field(default=0.0, ge=-2, le=2)
    """The same, for each time that it has them."""
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], UNSAID] = Field(default_factory=list)
    """Texts at which an answer ends: it is kept up to there, and counts as ended by itself."""
    max_reasoning_tokens: Annotated[int, UNSAID] = Field(default=2048, ge=1)
    """Most tokens of the reasoning before an answer, where there is any (`synthesis.reasoning`); `max_tokens` is then
    for the answer alone. One whose reasoning reaches them is dropped."""

    @property
    def used(self) -> dict[str, Any]:
        """What is set beyond temperature, nucleus and lengths, by name."""
        return {name: value for name, value in self.model_dump().items() if name not in ALWAYS_SAID}

    def untempered(self) -> Sampling:
        """The same length, drawn from the model's own distribution."""
        return Sampling(temperature=1.0, top_p=1.0, max_tokens=self.max_tokens)


class Engine(Section):
    """The vLLM engines of one stage."""

    concurrency: Annotated[Concurrency, PLACEMENT] = 1
    """Number of engine actors, or `[smallest, largest]`."""
    gpus: Annotated[int, PLACEMENT] = Field(default=0, ge=0)
    """GPUs of one engine, on one node; 0 runs it on the CPU."""
    pipeline_parallel: Annotated[int, MEMORY] = Field(default=1, ge=1)
    """Into how many groups, each with some of the layers, its GPUs are divided; a group splits every layer."""
    cpus: Annotated[int | None, PLACEMENT] = Field(default=None, ge=1)
    """CPU cores of one engine; by default all cores of the machine without GPUs, one with them."""
    max_model_len: int = Field(default=2048, ge=16)
    """Most tokens of a conversation, answer included, that the engine takes."""
    dtype: Dtype = "auto"
    """Precision of the engine; `auto` as in `student.dtype`."""
    kv_cache_gib: Annotated[float, PLACEMENT] = Field(default=2.0, gt=0)
    """Memory for the key-value cache of an engine on the CPU, in GiB."""
    batch_rows: Annotated[int | None, PLACEMENT] = Field(default=None, ge=1)
    """Rows in one block of work; the rows of `batches_in_flight` blocks are in the engine at once. By default 64 on
    GPUs, 16 on the CPU."""
    batches_in_flight: Annotated[int, PLACEMENT] = Field(default=4, ge=1)
    """Blocks that one engine works on at the same time."""
    prompt_lookup: Annotated[bool, UNSAID] = False
    """Draft from the conversation's own text, so that what an answer repeats is written several tokens at a time, as in
    revisions that change little. Greedy answers stay the same, sampled ones are other draws from the same distribution.
    Where it would pay, the synthesis says so."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Further arguments of vLLM's `AsyncEngineArgs`, passed on as they are (`quantization`, for example)."""

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if "hf_token" in options:
            raise ValueError("a job file is no place for a token; give it as HF_TOKEN in the environment")
        return options

    @property
    def rows_in_block(self) -> int:
        """`batch_rows` made definite."""
        return self.batch_rows or (GPU_BATCH_ROWS if self.gpus else CPU_BATCH_ROWS)

    @property
    def rows_in_flight(self) -> int:
        """Rows that one engine works on at the same time."""
        return self.rows_in_block * self.batches_in_flight

    @model_validator(mode="after")
    def _check_groups(self) -> Engine:
        if max(self.gpus, 1) % self.pipeline_parallel:
            raise ValueError(f"gpus = {self.gpus} cannot be divided into pipeline_parallel = {self.pipeline_parallel}")
        if self.prompt_lookup and "speculative_config" in self.options:
            raise ValueError("prompt_lookup: options have a speculative_config of their own; remove one of the two")
        return self


class Readers(Section):
    """Actors that read log-probs; each holds its models in one process, or partitioned over several."""

    concurrency: Annotated[Concurrency, PLACEMENT] = 1
    """Number of actors, or `[smallest, largest]`."""
    gpus: Annotated[float, PLACEMENT] = Field(default=0, ge=0)
    """GPUs of one process, 1 at most; a fraction shares a GPU. A model that one GPU cannot hold needs `shards`."""
    shards: Annotated[int, PLACEMENT] = Field(default=1, ge=1)
    """Processes of one actor, over which every weight is partitioned (ZeRO-3): for models that no device holds. They
    read different rows at the same time, and may lie on several nodes."""

    @model_validator(mode="after")
    def _check_processes(self) -> Readers:
        if self.gpus > 1:
            raise ValueError(
                f"gpus = {self.gpus:g}: one process reads on one GPU; "
                f"give gpus = 1 and shards = {math.ceil(self.gpus)} to partition the model over as many"
            )
        if self.shards > 1 and self.gpus not in (0, 1):
            raise ValueError(f"gpus = {self.gpus:g}: each of several shards takes a whole GPU, or none")
        if self.shards > 1 and smallest(self.concurrency) < largest(self.concurrency):
            raise ValueError("concurrency: actors of several shards are a fixed number; give one number")
        return self


class Server(Section):
    """A server that is asked over HTTP."""

    url: str = Field(pattern=r"^https?://[^@?\s]+$")
    """Base of its API, for example `http://teacher:8000/v1`, of a reward model `http://reward:8000`; a key does not
    belong here."""
    key_variable: str | None = Field(default=None, pattern=r"^[A-Z_][A-Z0-9_]*$")
    """Environment variable that holds the key, where the run is started; without one the server gets `none`. Its name
    has no small letters, so that a key written here by mistake is refused."""
    concurrency: Annotated[int, PLACEMENT] = Field(default=16, ge=1)
    """Requests at the same time."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Requests begun per minute at most, repeated ones among them."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds until a request without an answer counts as failed."""
    retries: int = Field(default=5, ge=0)
    """How often a failed request is made again."""
    pause_s: float = Field(default=1.0, gt=0)
    """Pause before the first repetition, in seconds; it doubles each time. A server that asks for longer gets it."""


class Endpoint(Server):
    """An OpenAI-compatible server (a vLLM server, a hosted model) in place of engines."""

    model: Address
    """The model's name on that server."""
    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The name under which it takes the most tokens of an answer; reasoning models refuse the first."""
    price_per_million: tuple[float, float] = (0.0, 0.0)
    """Price of a million tokens read and a million written, for the cost in the manifest."""
