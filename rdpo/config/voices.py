"""Speakers beside the teacher: other models that speak some turns of a task."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from rdpo.config.models import Endpoint, Engine, Sampling
from rdpo.config.section import Address, Section, TemplateArguments

VoiceName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
"""The name by which turns know a voice."""


class Voice(Section):
    """Who speaks the turns that name this voice: a model of its own, with engines or behind a server."""

    model: Address | None = None
    """The model, named as in `student.model`; by default the student itself."""
    adapter: Address | None = None
    """A LoRA adapter that it wears, as in `synthesis.adapter`."""
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    """Further arguments of its chat template, as in `synthesis.chat_template_kwargs`."""
    endpoint: Endpoint | None = None
    """A server that speaks (a table `endpoint`) instead of `model` and `engine`."""
    sampling: Sampling | None = None
    """How its turns are sampled; by default as `synthesis.sampling` says."""
    engine: Engine | None = None
    """Its engines; by default as `synthesis.engine` says."""
    weight: float = Field(default=1.0, gt=0)
    """How often it is drawn where a turn names several voices, beside the weights of the others."""

    @model_validator(mode="after")
    def _check_speaker(self) -> Voice:
        if self.endpoint and (self.model or self.adapter):
            raise ValueError("endpoint names a model already; remove model and adapter, or endpoint")
        return self
