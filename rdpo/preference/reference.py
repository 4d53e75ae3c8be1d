"""Reference log-probs of both completions, by the forward that training uses.

Adds `prompt_ids`, `chosen_ids`, `rejected_ids` (the student's tokenizer; tokens that do not count as in
`rdpo.modeling.masking`; an answer that was drawn with the student's vocabulary has the tokens that were drawn) and
`reference_chosen_logps`, `reference_rejected_logps` (sums over the completion's tokens that count, fp32). A group has
`others_ids` and `reference_others_logps` too, of the answers between those two, in the order of preference. The stage's
key holds the weights' fingerprint, so a cached value never outlives the weights it came from.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa

from rdpo.cluster.hardware import allocator_environment
from rdpo.cluster.pools import BLOCK_ROWS, Held, Pool
from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.files.stage_folder import StageFolder
from rdpo.messages import is_plain
from rdpo.modeling.chat import Answer, Chat, student_chat
from rdpo.modeling.masking import read_ids
from rdpo.modeling.packing import PairSize
from rdpo.modeling.readers import Reader
from rdpo.modeling.student import frozen_student
from rdpo.modeling.weights import ModelRef
from rdpo.preference.known_logps import KnownLogps, recalled
from rdpo.records import DRAWN, DRAWN_COLUMNS, OTHERS, SCORE_COLUMNS, SIDES, Row, alive, drop, others_of, text_of
from rdpo.training.backend import backend_of
from rdpo.training.sharded import open_reader

if TYPE_CHECKING:
    import ray.data
    from ray import ObjectRef

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REASON_CHARS = 200
ROWS_OF_SHARD = 8
"""Rows of a block for each process of a partitioned model at least, so that none of them idles for long."""

TOO_LONG = "pair is longer than reference.max_length"
FORWARD = "forward.json"
"""In the folder of the reference: the layout in which log-probs are those of the model's own logits."""


def add_reference(
    rows: ray.data.Dataset, job: Job, known: KnownLogps | None = None, run_dir: str | None = None
) -> ray.data.Dataset:
    """Add token ids and the reference's log-probs to the rows of pairs; those `known` are not computed again.

    How the model was read is noted in the run's folder of the reference.
    """
    import ray

    arguments = {"job": job, "known": ray.put(known) if known else None, "run_dir": run_dir}
    return reference_pool(job).map(rows, Reference, **arguments)


def as_referred(job: Job, run_dir: str) -> Job:
    """The job, its layout made definite by what was found when the reference was read.

    Raises:
        InputError: it asks for packed rows, and they are not exact.
    """
    forward = StageFolder(run_dir, "reference").read_json(FORWARD)
    if not forward or job.training.layout == "padded":
        return job
    if job.training.layout == "packed" and not forward["packable"]:
        why = f" ({forward['why']})" if forward["why"] else ""
        raise InputError(f"training.layout: packed rows of {job.student.model} are not exact{why}; use auto or padded")
    layout = "packed" if forward["packable"] else "padded"
    return job.model_copy(update={"training": job.training.model_copy(update={"layout": layout})})


def reference_pool(job: Job) -> Pool:
    """The actors that hold the reference model, each of them one process or several."""
    settings, nodes = job.reference, job.cluster.placement.trainer
    return Pool(
        "reference",
        "reference",
        settings.concurrency,
        1,
        settings.gpus,
        nodes,
        block_rows=max(BLOCK_ROWS, ROWS_OF_SHARD * settings.shards),
        shards=settings.shards,
        environment=allocator_environment() if settings.gpus else {},
        holds=(Held(ModelRef.student(job), job.student.dtype, settings.tokens_per_batch, job.training.logprob_chunk),),
    )


def tokenize_pair(row: Row, chat: Chat, max_length: int, vocabulary: int | None = None) -> Row:
    """The row with the ids of prompt and both completions, or dropped with the reason.

    `vocabulary`: how many ids the model has a row for.
    """
    others = _others(row)
    try:
        found = chat.pair_ids(row["prompt"], {side: _answer(row, side) for side in SIDES} | others)
    except ValueError as error:
        without: Row = {name: [] for name in ID_COLUMNS}
        return drop({**row, **without, "dropped": None}, f"chat template refuses the pair: {str(error)[:REASON_CHARS]}")

    row = {**row, **{f"{name}_ids": found[name] for name in ("prompt", *SIDES)}, "dropped": None}
    if others:
        row["others_ids"] = [found[name] for name in others]
    answers = [tokens for name, tokens in found.items() if name != "prompt"]
    if not all(answers):
        return drop(row, "a completion has no tokens")
    if found["chosen"] == found["rejected"]:
        return drop(row, "chosen and rejected have the same tokens")
    if len(set(map(tuple, answers))) < len(answers):
        return drop(row, "two answers of the group have the same tokens")
    if pair_size(row).longest > max_length:
        too_long = "an answer of the group is longer than reference.max_length" if others else TOO_LONG
        return drop(row, too_long)
    if vocabulary is not None and max(max(read_ids(tokens)) for tokens in found.values()) >= vocabulary:
        return drop(row, "a token lies beyond the model's embedding")
    return row


def _answer(row: Row, side: str) -> Answer:
    messages = row[side]
    return Answer(
        text_of(messages),
        row[f"{side}_finished"],
        row.get(f"{side}_reasoning") or "",
        tuple(row.get(f"{side}{DRAWN}") or ()),
        () if len(messages) == 1 and is_plain(messages) else tuple(messages),
    )


def _others(row: Row) -> dict[str, Answer]:
    """The answers of a group between its chosen and its rejected one, by names that are no side's."""
    return {f"{OTHERS} {place}": _answer(one, OTHERS) for place, one in enumerate(others_of(row))}


def pair_size(row: Row) -> PairSize:
    """Tokens of a pair's parts."""
    others = tuple(map(len, row.get("others_ids") or ()))
    return PairSize(len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"]), others)


class Reference:
    """A Ray Data actor that holds the reference model, once there is a pair whose log-probs are not known.

    `known`: an object reference to `KnownLogps`. `run_dir`: where it is noted how the model was read.
    """

    def __init__(self, job: Job, known: ObjectRef[KnownLogps] | None = None, run_dir: str | None = None):
        self.job, self.settings, self.run_dir = job, job.reference, run_dir
        self.known = _held(known) if known else {}
        student = ModelRef.student(job)
        self.chat, self.vocabulary = student_chat(job), student.config().get_text_config().vocab_size

    @cached_property
    def reader(self) -> Reader:
        """The reference model, once its log-probs are known to be those of its own logits.

        It is loaded with the first pair that needs it: a run whose log-probs are all known loads none.

        Raises:
            InputError: they are not.
        """
        reader = open_reader(
            frozen_student(self.job),
            reference_pool(self.job),
            self.settings.tokens_per_batch,
            backend_of(self.job),
            self.settings.cpus,
        )
        if self.run_dir:
            StageFolder(self.run_dir, "reference").write_json(FORWARD, asdict(reader.read_as))
        return reader

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Tokenize a block of pairs and add their log-probs."""
        longest, vocabulary = self.settings.max_length, self.vocabulary
        pairs = (tokenize_pair(row, self.chat, longest, vocabulary) for row in batch.to_pylist())
        rows = [recalled(pair, self.known) for pair in pairs]
        missing = [row for row in rows if alive(row) and row["reference_chosen_logps"] is None]
        # Those with as many answers together: a forward reads as many to each of its prompts.
        for count in sorted({len(pair_size(row).answers) for row in missing}):
            self._fill([row for row in missing if len(pair_size(row).answers) == count])
        return pa.Table.from_pylist(rows, schema=_schema(batch.schema))

    def _fill(self, rows: list[Row]) -> None:
        prompts = [row["prompt_ids"] for row in rows]
        answers = [[row["chosen_ids"], row["rejected_ids"], *(row.get("others_ids") or ())] for row in rows]
        found = self.reader(prompts, *zip(*answers, strict=True))
        for row, (chosen, rejected, *others) in zip(rows, zip(*found, strict=True), strict=True):
            row["reference_chosen_logps"], row["reference_rejected_logps"] = chosen, rejected
            if others:
                row["reference_others_logps"] = others


def _held(known: ObjectRef[KnownLogps]) -> KnownLogps:
    import ray

    found: KnownLogps = ray.get(known)
    return found


def _schema(pairs: pa.Schema) -> pa.Schema:
    # Named, not inferred: a block in which all rows are dropped would have null columns, which fit no other block's.
    ids = [pa.field(name, pa.list_(pa.int32())) for name in ID_COLUMNS]
    logps = [pa.field(f"reference_{side}_logps", pa.float64()) for side in SIDES]
    kept = [field for field in pairs if field.name not in ("dropped", *SCORE_COLUMNS, *DRAWN_COLUMNS)]
    if OTHERS in pairs.names:
        ids.append(pa.field("others_ids", pa.list_(pa.list_(pa.int32()))))
        logps.append(pa.field("reference_others_logps", pa.list_(pa.float64())))
    return pa.schema([*kept, *ids, *logps, pa.field("dropped", pa.string())])
