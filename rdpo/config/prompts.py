"""The prompts, and who answers, critiques and revises."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from rdpo.config.models import Endpoint, Engine, Sampling
from rdpo.config.section import UNSAID, Address, Section, Source, TemplateArguments
from rdpo.records import HELDOUT, TRAIN, split_name


class Prompts(Section):
    """Where the prompts come from and how they are split."""

    source: Source
    """A JSONL, Parquet or CSV file or a folder of them, on disk or in an object store (`s3://…`), or `hf:DATASET` for a
    Hugging Face dataset, with `@` and a branch, tag or commit behind it for another than the newest. JSON and CSV files
    may be compressed (`.jsonl.gz`, `.jsonl.zst`)."""
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
    """Share of prompts held out for evaluation, where the source has no `split` column."""
    near_duplicates: Literal["count", "drop"] = "count"
    """Training prompts that nearly repeat a held-out one are counted, or dropped (`drop`). Two prompts are
    near-duplicates if they share at least 80% of their five-character sequences (Jaccard similarity; case and white
    space do not count)."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longer prompts (student's tokenizer, chat template included) are dropped, never cut."""


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
    """Further arguments of the teacher's chat template, on a server too; those that it does not read are refused. Where
    the student teaches itself, these are the student's, unless given."""
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

    @property
    def trains_on_reasoning(self) -> bool:
        """Whether answers are trained on, and evaluated, with the reasoning before them."""
        return self.reasoning in ("keep", "mask")
