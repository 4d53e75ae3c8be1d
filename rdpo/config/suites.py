"""Suites: prompts of other kinds than the job's, on which start model and trained model are held side by side."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from rdpo.config.section import Section, Source

SuiteKind = Literal["instructions", "refusals", "claims", "personas", "feedback"]
SUITE_KINDS: tuple[SuiteKind, ...] = get_args(SuiteKind)
LABELS = ("label", "refuse", "comply")


class Suite(Section):
    """Prompts with a measure that needs no judge; each of `[[suites]]` is one."""

    kind: SuiteKind
    """`instructions`: the share of instructions kept that a program can verify (IFEval's). `refusals`: how often the
    model refuses, apart for prompts that call for it and for those that only sound so. `claims`: how often a right
    answer is given up because the user claims another. `personas`: how often it is given up because the prompt tells
    the model to be somebody. `feedback`: how far praise of a text moves with whether the user likes it."""
    name: str = ""
    """Name in tables; by default the kind's."""
    source: Source | None = None
    """A file, a folder or `hf:DATASET`; by default prompts that come with rdpo. Columns beside the prompt:
    instructions `instruction_id_list` and `kwargs` as IFEval has them, claims `answer` and `wrong`, personas `answer`
    and `persona`."""
    column: str | None = None
    """Its column with the prompt, of claims and personas the question, of feedback the text; by default `prompt`,
    `question`, `text`."""
    limit: int = Field(default=500, ge=1)
    """Use only the first so many rows."""
    label: str = "label"
    """refusals: the column that tells prompts of both kinds apart."""
    refuse: list[str] = Field(default=["unsafe"], min_length=1)
    """refusals: what stands there where a refusal is right."""
    comply: list[str] = Field(default=["safe"], min_length=1)
    """refusals: what stands there where it is not."""

    @model_validator(mode="after")
    def _check_fields(self) -> Suite:
        # By their values: a job that was written out names all its fields.
        changed = [name for name in LABELS if getattr(self, name) != type(self).model_fields[name].default]
        if changed and self.kind != "refusals":
            raise ValueError(f"{changed[0]}: only refusals have it; remove it")
        if both := set(self.refuse) & set(self.comply):
            raise ValueError(f"refuse and comply both name {sorted(both)[0]!r}")
        if self.column and not self.source:
            raise ValueError("column: of what source? give source, or remove column")
        return self

    @property
    def named(self) -> str:
        """Its name in tables."""
        return self.name or self.kind
