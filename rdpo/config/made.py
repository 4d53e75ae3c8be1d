"""Prompts that a model writes, where a user has none."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rdpo.config.models import Engine, Sampling
from rdpo.config.section import Address, Section, Source, TemplateArguments

OF_PERSONAS = ("personas", "topics", "template")
"""What `kind = "personas"` needs, and no other kind takes."""


class Texts(Section):
    """Texts that questions are asked for, one a row."""

    source: Source
    """Where they are, as `prompts.source` says it."""
    column: str
    """Column with the text. A row without any is refused."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    dataset_split: str = "train"
    """Which split of a Hugging Face dataset is read."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many rows; by default all."""


class Made(Section):
    """Prompts that a model writes, in place of `prompts.source`. They are read as those of a source are."""

    kind: Literal["magpie", "personas"]
    """`magpie` (arXiv 2406.08464): the model gets what its chat template writes before a user's first message, and what
    it goes on with until the end of that message is the prompt. `personas`: the model is asked for a prompt in the
    words of `template`."""
    count: int = Field(ge=1)
    """How many are written. Those that are empty or cut off by the token limit are dropped, and as in any source
    duplicates are."""
    model: Address | None = None
    """The model that writes them, named as in `student.model`; by default the teacher. Not behind a server."""
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Seed of the draws; by default the job's `seed`. With one of their own the prompts are the same for every `seed`
    of the job. A prompt depends on this seed and its number alone, not on what is written beside it."""
    system: str | None = None
    """System message before the user's message while it is written, or before the question for one. It is no part of
    the prompts; `prompts.system` is."""
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    """Further arguments of the model's chat template; by default the teacher's, where the teacher writes."""
    sampling: Sampling | None = None
    """How they are drawn; by default as `synthesis.sampling` says."""
    engine: Engine | None = None
    """The engines that write them; by default as `synthesis.engine` says."""
    personas: Texts | None = None
    """Who asks, for `personas`: a table with `source` and `column`."""
    topics: Texts | None = None
    """What about, for `personas`: another such table. Persona and topic are drawn together, no combination a second
    time before all were drawn, and both stay with the prompt as the columns `persona` and `topic`."""
    template: str | None = None
    """The question for a prompt, for `personas`: a template that uses `{{ persona }}` and `{{ topic }}`, and may use
    `{{ number }}`, the prompt's own from 1 on."""

    @model_validator(mode="after")
    def _check_kind(self) -> Made:
        given = [name for name in OF_PERSONAS if getattr(self, name) is not None]
        if self.kind != "personas" and given:
            raise ValueError(f'{given[0]}: kind = "{self.kind}" takes none; remove it, or set kind = "personas"')
        if self.kind == "personas" and len(given) < len(OF_PERSONAS):
            missing = next(name for name in OF_PERSONAS if name not in given)
            raise ValueError(f'{missing}: kind = "personas" needs it')
        return self
