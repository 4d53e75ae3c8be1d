"""Task files: the wording of the teacher's turns, in TOML of their own."""

from __future__ import annotations

from itertools import chain
from typing import Annotated

from pydantic import Field, field_validator

from rdpo.config.section import UNSAID, Section
from rdpo.config.voices import VoiceName


class Turn(Section):
    """One answer of the teacher, in a `[[turns]]` table."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name of the answer; by it later turns, `pairs.chosen` and `pairs.rejected` know it. Prompts that have a column of
    this name are refused, unless this turn or an earlier one uses the column, and no later one the name."""
    after: str | None = None
    """The earlier turn whose conversation this one continues; by default it begins one of its own."""
    system: str | None = None
    """Template of a system message, where the turn begins a conversation."""
    user: str | None = None
    """Template of what is asked; by default the prompt as it is. It may use `{{ prompt }}` (the prompt as text),
    earlier answers by name, the other columns of the prompt's row, and the job's `synthesis.values`."""
    prefill: str = ""
    """Template of the words that the answer begins with; a server as teacher cannot continue any."""
    rewrites: Annotated[str | None, UNSAID] = None
    """Name of an earlier answer, of which a segment of `max_tokens` tokens is written anew, at a place that is drawn
    for each prompt; its other words stay (SAPO, arXiv 2405.20830). A server as teacher cannot."""
    given: Annotated[str | None, UNSAID] = None
    """Template of the answer itself, which nobody speaks then: a column of the prompts, for example."""
    temperature: float | None = Field(default=None, ge=0)
    """In place of the job's."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """In place of the job's."""
    max_tokens: int | None = Field(default=None, ge=1)
    """In place of the job's."""
    samples: int = Field(default=1, ge=1)
    """How many answers are drawn: from 2 on they are named NAME_1, NAME_2, …"""
    voice: Annotated[VoiceName | list[VoiceName] | None, UNSAID] = None
    """Who speaks it: a table `[synthesis.voices.NAME]` of the job; by default the teacher. Of a list one is drawn for
    each prompt, by the weights of the voices; several samples are spoken by different ones, as far as there are so
    many."""

    @field_validator("voice")
    @classmethod
    def _check_several(cls, voice: str | list[str] | None) -> str | list[str] | None:
        if isinstance(voice, list) and (len(voice) < 2 or len(set(voice)) < len(voice)):
            raise ValueError("a list is of two voices or more, each of them once")
        return voice

    @property
    def voices(self) -> list[str | None]:
        """Those who may speak it; None is the teacher."""
        return list(self.voice) if isinstance(self.voice, list) else [self.voice]

    @property
    def names(self) -> list[str]:
        """Names of its answers: its own, or NAME_1, NAME_2, ... where it is sampled several times."""
        if self.samples == 1:
            return [self.name]
        return [f"{self.name}_{number}" for number in range(1, self.samples + 1)]


class Task(Section):
    """The wording of the teacher's turns, in a TOML file of its own that `synthesis.task` names."""

    name: str
    """Name of the task."""
    description: str = ""
    """What it is for."""
    turns: list[Turn] = Field(min_length=1)
    """The turns, in the order in which they are spoken."""

    @property
    def answers(self) -> list[str]:
        """Names of all answers, in order."""
        return list(chain.from_iterable(turn.names for turn in self.turns))
