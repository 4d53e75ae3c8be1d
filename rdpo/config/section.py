"""What all tables of a job file have in common, and types that several of them use."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
)

UNSAID = "unsaid"
"""Mark of a field that a dump leaves out where it has its default, as `Annotated[str, UNSAID]`: stages' keys are made
of dumps, and a job that does not use what a later version added keeps the keys that it had."""


class Section(BaseModel):
    """A table of the job file: unknown keys are errors, and values are not changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_unsaid(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        for name, field in type(self).model_fields.items():
            if UNSAID in field.metadata and getattr(self, name) == field.get_default(call_default_factory=True):
                found.pop(name, None)
        return found


Table = dict[str, Any]
"""A table of a TOML file, as it is read: values by their keys, checked by nobody yet."""

PLACEMENT = "placement"
"""Mark of a field that only says where and in what portions work is done, as `Annotated[int, PLACEMENT]`: changing it
makes no stage again."""

MEMORY = "memory"
"""Mark of a field that trades memory for speed, or says when to give up, and changes no number beyond rounding:
changing it makes no stage again either, and what is half made goes on."""

TemplateArguments = dict[str, JsonValue]
"""Arguments of a chat template, by name."""

Dtype = Literal["auto", "bfloat16", "float32"]
"""`auto`: bfloat16 on GPUs and on CPUs that multiply in it, else float32."""

Layout = Literal["auto", "packed", "padded"]
"""How token rows reach the model, see `Training.layout`."""


ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#\s]*)([^\s]*)", re.IGNORECASE)
"""Scheme, host (with whoever stands before an `@`), and the rest."""
SECRET_USERS = {"http", "https", "ftp", "s3", "gs", "gcs"}
"""Schemes in which the user alone may be a token; HDFS names one openly, and Azure has a container there."""


def may_hold_secret(text: str) -> bool:
    """Whether a text has an address in it that names a user, a password or a query."""
    for scheme, host, rest in ADDRESS.findall(text):
        user = host.rpartition("@")[0]
        if user and (":" in user or scheme.lower() in SECRET_USERS):
            return True
        if "?" in rest:
            return True
    return False


def _without_secret(address: str) -> str:
    if may_hold_secret(address):
        raise ValueError(
            "an address stands in the run's files, report and model card: no user, password or ?query may be in it; "
            "leave keys to environment variables (AWS_…, HF_TOKEN), and download what can only be had by a query"
        )
    return address


Address = Annotated[str, AfterValidator(_without_secret)]
"""Where data or a model is: a path, a hub id or an address. The run's files and report repeat it."""
Source = Address
"""Where data is."""


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
