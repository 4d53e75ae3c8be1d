"""The prompts, and who answers, critiques and revises."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from rdpo.config.made import Made
from rdpo.config.models import Endpoint, Engine, Sampling
from rdpo.config.section import UNSAID, Address, Section, Source, TemplateArguments
from rdpo.config.voices import Voice, VoiceName
from rdpo.records import HELDOUT, TRAIN, split_name

SOURCE_FIELDS = ("subset", "dataset_split", "limit")
"""What `[prompts]` says of its one source, and each of several says for itself."""
SHARED_FIELDS = ("column", "system", "templates", "heldout_templates")
"""What each of several sources may say for itself, and has from `[prompts]` otherwise."""


class PromptSource(Section):
    """One of several sources of prompts, in place of `prompts.source`."""

    source: Source
    """Where it is, as `prompts.source` says it. No file or split of a data set may be read by two of them."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    dataset_split: str = "train"
    """Which split of a Hugging Face dataset is read."""
    column: str | None = None
    """Column with the prompt; by default `prompts.column`."""
    system: str | None = None
    """System message put before each prompt that has none; by default `prompts.system`."""
    templates: list[str] | None = None
    """What its prompts are put into; by default `prompts.templates`."""
    heldout_templates: list[str] | None = None
    """Those of its held-out prompts; by default its own `templates`, else `prompts.heldout_templates`."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many rows; by default all."""
    share: float | None = Field(default=None, gt=0)
    """How much of the prompts trained on is from here, beside the shares of the other sources: 3 and 1 are three
    quarters and one. As many prompts are drawn as the shares allow without taking one twice, by their ids, the same for
    every `seed`; others are dropped and counted. Held-out prompts are thinned in the same measure. All sources have a
    share, or none has: then all of their prompts are used."""


class Prompts(Section):
    """Where the prompts come from and how they are split."""

    source: Source | None = None
    """A JSONL, Parquet or CSV file or a folder of them, on disk or in an object store (`s3://…`), or `hf:DATASET` for a
    Hugging Face dataset, with `@` and a branch, tag or commit behind it for another than the newest. JSON and CSV files
    may be compressed (`.jsonl.gz`, `.jsonl.zst`). Required, unless there are `sources`, or prompts are `made`."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    dataset_split: str = "train"
    """Which split of a Hugging Face dataset is read."""
    column: str = "prompt"
    """Column with the prompt: text (one user turn) or a list of `{role, content}` messages."""
    system: str | None = None
    """System message put before each prompt that has none."""
    templates: list[str] = Field(default_factory=list)
    """Each prompt is put into one of these, drawn by its id; a template has `{{ prompt }}`, and may use the row's other
    columns. The bare prompt stays in the row as `bare`. For a jailbreak's wording around a question, for example."""
    heldout_templates: list[str] = Field(default_factory=list)
    """Those of the held-out prompts; by default the same."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many rows of the source; by default all."""
    heldout_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of prompts held out for evaluation, where the source has no `split` column. Each is drawn by its own words,
    so that it stays where it is when others come: of a few dozen it may be some more or fewer."""
    near_duplicates: Literal["count", "drop"] = "count"
    """Training prompts that nearly repeat a held-out one are counted, or dropped (`drop`). Two prompts are
    near-duplicates if they share at least 80% of their five-character sequences (Jaccard similarity; case and white
    space do not count)."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longer prompts (student's tokenizer, chat template included) are dropped, never cut."""
    sources: Annotated[list[PromptSource], UNSAID] = Field(default_factory=list)
    """Several sources in place of `source`, each a table `[[prompts.sources]]`."""
    made: Annotated[Made | None, UNSAID] = None
    """Prompts that a model writes in place of `source`, in a table `[prompts.made]`."""

    @model_validator(mode="after")
    def _check_made(self) -> Prompts:
        if self.made is None:
            return self
        for name in ("source", "sources"):
            if getattr(self, name):
                raise ValueError(f"made: the prompts are written, and {name} names some that are read; remove either")
        for name in (*SOURCE_FIELDS, "column"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is that of a source, and the prompts are made; remove {name}")
        return self

    @model_validator(mode="after")
    def _check_sources(self) -> Prompts:
        if self.made:
            return self
        if (self.source is None) == (not self.sources):
            raise ValueError("give either source, or a table [[prompts.sources]] for each of several")
        if not self.sources:
            return self
        for name in SOURCE_FIELDS:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is that of one source: write it into its table of [[prompts.sources]]")
        places = [(one.source, one.subset, one.dataset_split) for one in self.sources]
        if twice := next((place for place in places if places.count(place) > 1), None):
            raise ValueError(f"sources: {twice[0]} is named twice; remove one of them")
        without = [number for number, one in enumerate(self.sources) if one.share is None]
        if without and len(without) < len(self.sources):
            raise ValueError(f"sources.{without[0]}: has no share, and others have; give all of them one, or none")
        return self

    @property
    def name(self) -> str:
        """What is read, for a person."""
        return self.source or ", ".join(one.source for one in self.sources) or "prompts.made"

    @property
    def has_shares(self) -> bool:
        """Whether prompts of several sources are drawn by shares."""
        return any(one.share for one in self.sources)

    def each(self) -> list[Prompts]:
        """The same for each of the sources alone."""
        return [self._only(one) for one in self.sources] or [self]

    def _only(self, one: PromptSource) -> Prompts:
        own = {name: getattr(one, name) for name in ("source", *SOURCE_FIELDS)}
        own |= {name: getattr(one, name) for name in SHARED_FIELDS if getattr(one, name) is not None}
        if one.templates is not None and one.heldout_templates is None:
            # Those of `[prompts]` are for its own templates.
            own["heldout_templates"] = []
        return self.model_copy(update={**own, "sources": []})


def _trained_on(split: str) -> str:
    name = split_name(split)
    if name == HELDOUT:
        raise ValueError("these prompts are held out for evaluation; name a split to train on")
    return name


class Synthesis(Section):
    """Who answers, critiques and revises, and in which words."""

    task: Address | None = None
    """Task file with the templates of the turns; a path, or the name of one that ships with rdpo. Without one
    nothing is synthesised: the source of the prompts is a preference data set, with the columns `chosen`
    and `rejected`, perhaps `score_chosen` and `score_rejected`."""
    values: dict[str, str] = Field(default_factory=dict)
    """Words that the task's templates use by name, the style of a counterfactual task for example. None may be named
    like a column of the prompts, or like the answer of an earlier turn where a template uses it."""
    split: Annotated[str, AfterValidator(_trained_on)] = TRAIN
    """Which split of the prompts is trained on: `train`, or one that the source's `split` column names. Those that are
    held out for evaluation are refused."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many prompts, the first by id; by default all."""
    teacher: Address | None = None
    """The teacher's model, named as in `student.model`; by default the student itself."""
    adapter: Address | None = None
    """A LoRA adapter that the teacher wears: a folder, an address in an object store, or a hub id."""
    chat_template_kwargs: Annotated[TemplateArguments, UNSAID] = Field(default_factory=dict)
    """Further arguments of the teacher's chat template; those that it does not read are refused. A server is sent them
    too, and may leave them out without a word. Where the student teaches itself, these are the student's, unless
    given."""
    reasoning: Annotated[Literal["off", "strip", "keep", "mask"], UNSAID] = "off"
    """What is made of the reasoning that models write before an answer, or that a preference data set has. `off`:
    models are asked for answers without any. `strip`: the teacher thinks, and only its answers go on; the student
    learns to answer without thinking. `keep`: the student learns to think before it answers, and is evaluated so.
    `mask`: the same, but no token of the reasoning counts in the loss. Rewards score the answer alone. An answer that
    ends inside its reasoning is dropped."""
    endpoint: Endpoint | None = None
    """A server as the teacher (a `[synthesis.endpoint]` table) instead of `teacher` and `engine`."""
    sampling: Sampling = Sampling()
    """How the teacher's turns are sampled."""
    engine: Engine = Engine()
    """The teacher's engines."""
    voices: Annotated[dict[VoiceName, Voice], UNSAID] = Field(default_factory=dict)
    """Further speakers, each in a table `[synthesis.voices.NAME]`. A turn of the task names the one that speaks it; a
    turn that names none is the teacher's."""

    @property
    def trains_on_reasoning(self) -> bool:
        """Whether answers are trained on, and evaluated, with the reasoning before them."""
        return self.reasoning in ("keep", "mask")
