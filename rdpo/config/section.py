"""What all tables of a job file have in common, and types that several of them use."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A table of the job file: unknown keys are errors, and values are not changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


PLACEMENT = "placement"
"""Mark of a field that only says where and in what portions work is done, as `Annotated[int, PLACEMENT]`: changing it
makes no stage again."""

Dtype = Literal["auto", "bfloat16", "float32"]
"""`auto`: bfloat16 on GPUs and on CPUs that multiply in it, else float32."""

Layout = Literal["auto", "packed", "padded"]
"""How token rows reach the model, see `Training.layout`."""


KEY_IN_ADDRESS = re.compile(
    r"https?://[^/\s]*@|://[^/\s:@]*:[^/\s@]*@|[?&]([^=&]*(key|token|secret|signature|password|credential)[^=&]*|sig)=",
    re.IGNORECASE,
)


def _keyless(address: str) -> str:
    if KEY_IN_ADDRESS.search(address):
        raise ValueError("a job file is no place for a key or password; leave it to the environment")
    return address


Source = Annotated[str, AfterValidator(_keyless)]
"""Where data is; it stands in the run's files and report, so no key may be in it."""


def _ordered(value: int | tuple[int, int]) -> int | tuple[int, int]:
    if isinstance(value, tuple) and value[0] > value[1]:
        raise ValueError("write it as [smallest, largest]")
    return value


Actors = Annotated[int, Field(ge=1)]
Concurrency = Annotated[Actors | tuple[Actors, Actors], AfterValidator(_ordered)]
"""Number of actors of a pool, or `[smallest, largest]`: it grows while all actors are busy and more rows wait."""


def smallest(concurrency: Concurrency) -> int:
    """The number that a pool of actors or a group of workers needs at least."""
    return concurrency if isinstance(concurrency, int) else concurrency[0]


def largest(concurrency: Concurrency) -> int:
    """The number that a pool of actors or a group of workers grows to."""
    return concurrency if isinstance(concurrency, int) else concurrency[1]
