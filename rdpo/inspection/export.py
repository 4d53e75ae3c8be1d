"""What a run made, in the formats that other programs read.

Pairs become a preference data set: conversational `prompt`, `chosen` and `rejected` with their scores, as Parquet with
a card, which TRL and the `datasets` library load as it is; of a group its chosen answer with each other one. Groups
become rows of `prompt`, `answers` and `scores`, in the order of preference, as Parquet. The answers of the evaluation
become AlpacaEval's outputs: a JSON list of `instruction`, `output` and `generator` for each of the two models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rdpo import __version__
from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.evaluation.publish import rendered_card
from rdpo.execution.reader import RunReader
from rdpo.files.folder import Folder
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder
from rdpo.messages import CALLS, TOOLS, template_form, tools_of
from rdpo.records import HELDOUT, ID_COLUMN, OTHERS, QUESTION, SIDES, Row, others_of, table_of, text_of
from rdpo.synthesis.voices import models_named

PAIR_COLUMNS = (
    ID_COLUMN,
    QUESTION,
    "prompt",
    "chosen",
    "rejected",
    "score_chosen",
    "score_rejected",
    "reward_gap",
    "chosen_scores",
    "rejected_scores",
    "chosen_from",
    "rejected_from",
    "chosen_voice",
    "rejected_voice",
)
REASONING_KEY = "reasoning_content"
"""Under which most templates, and TRL, look for the reasoning of a message."""
REASONED = pa.list_(pa.struct([(name, pa.string()) for name in ("role", "content", REASONING_KEY)]))
STAGES = {"pairs": "pairs", "groups": "pairs", "answers": "evaluation"}


def export(run_dir: str, what: str, target: str) -> list[str]:
    """Write the `pairs`, `groups` or `answers` of a run to a new folder, on disk or in a store; what was written.

    Raises:
        InputError: their stage is not finished or holds no such rows, or the folder is not empty.
    """
    run = RunReader(run_dir)
    name = STAGES[what]
    job, stage, manifest = run.job_of(name), run.folder(name), run.require(name)
    if not stage.parts():
        raise InputError(f"{run_dir}: the {stage.name} stage holds no rows; see its dropped reasons")
    if what == "groups" and OTHERS not in stage.schema().names:
        raise InputError(f"{run_dir}: holds pairs, no groups (`pairs.others`); export its pairs")
    folder = Folder(target)
    if folder.files():
        raise InputError(f"{target}: is not empty; name a new folder")
    with folder.made() as made:
        if what == "answers":
            written = _answers(stage, job, made)
        else:
            written = _pairs(stage, manifest, job, made) if what == "pairs" else _groups(stage, made)
    return [f"{count} {what} -> {folder.address(name)}" for name, count in written.items()]


def _pairs(stage: StageFolder, manifest: Manifest, job: Job, made: Path) -> dict[str, int]:
    (made / "data").mkdir()
    # No table holds arguments of calls, whose names and types differ from row to row.
    write, ending = (_write_lines, "jsonl") if _calls(stage.schema()) else (_write, "parquet")
    counts = {
        split: write(_split(stage, heldout), made / "data" / f"{split}.{ending}")
        for split, heldout in (("train", False), ("test", True))
    }
    splits = {split: count for split, count in counts.items() if count}
    facts = {"job": job, "manifest": manifest, "splits": splits, "version": __version__, "ending": ending}
    facts["speakers"] = models_named(job)
    (made / "README.md").write_text(rendered_card("dataset.md.jinja", **facts), encoding="utf-8")
    return {f"data/{split}.{ending}": count for split, count in splits.items()}


def _groups(stage: StageFolder, made: Path) -> dict[str, int]:
    counts = {}
    for split, heldout in (("train", False), ("test", True)):
        path = made / f"{split}.parquet"
        rows = ([_group(row) for row in part.to_pylist() if bool(row[HELDOUT]) == heldout] for part in stage.tables())
        if count := _write((table_of(some).drop_columns("dropped") for some in rows), path):
            counts[path.name] = count
    return counts


def _group(row: Row) -> Row:
    """A group in the order of preference."""
    whole = {
        name: [row[f"chosen{name}"], *(one[f"{OTHERS}{name}"] for one in others_of(row)), row[f"rejected{name}"]]
        for name in ("", "_from")
    }
    scores = [row["score_chosen"], *(one[f"score_{OTHERS}"] for one in others_of(row)), row["score_rejected"]]
    return {
        ID_COLUMN: row[ID_COLUMN],
        "prompt": row["prompt"],
        "answers": whole[""],
        "scores": scores,
        "answers_from": whole["_from"],
    }


def _against_rest(rows: pa.Table) -> pa.Table:
    """Groups as pairs of the chosen answer with each other one, whose number is in the id."""
    if OTHERS not in rows.column_names:
        return rows
    found = []
    for row in rows.to_pylist():
        found.append(row)
        for number, one in enumerate(others_of(row), start=1):
            other = {
                name.replace(OTHERS, "rejected"): value for name, value in one.items() if not name.startswith("gap")
            }
            gap = {"reward_gap": one[f"gap_{OTHERS}"], ID_COLUMN: f"{row[ID_COLUMN]}/{number}"}
            found.append({**row, **other, **gap})
    return pa.Table.from_pylist(found, rows.schema)


def _calls(schema: pa.Schema) -> bool:
    """Whether messages of pairs have more than roles and contents."""
    messages = (schema.field(name).type.value_type for name in ("prompt", *SIDES))
    return any(kind.get_field_index(CALLS) >= 0 for kind in messages)


def _split(stage: StageFolder, heldout: bool) -> Iterator[pa.Table]:
    """The pairs that are trained on, or those that are held out, part by part in one schema."""
    schema = stage.schema()
    named = [name for name in PAIR_COLUMNS if name in schema.names]
    for part in stage.tables():
        # Columns that only later parts have are null in this one.
        rows = _against_rest(pa.concat_tables([schema.empty_table(), part], promote_options="permissive"))
        chosen = rows.filter(pc.equal(pc.fill_null(rows[HELDOUT], False), heldout))
        yield _with_reasoning(chosen, named)


def _with_reasoning(rows: pa.Table, named: list[str]) -> pa.Table:
    """Some columns of pairs, the reasoning of an answer within its message."""
    found = rows.select(named)
    for side in SIDES:
        if (column := f"{side}_reasoning") not in rows.column_names:
            continue
        texts = zip(rows[side].to_pylist(), rows[column].to_pylist(), strict=True)
        messages = [[{**answer[0], REASONING_KEY: thought}] for answer, thought in texts]
        found = found.set_column(named.index(side), side, pa.array(messages, REASONED))
    return found


def _write(tables: Iterator[pa.Table], path: Path) -> int:
    """Write tables of one schema as a Parquet file, unless they hold no row; how many rows they hold."""
    writer, count = None, 0
    for table in tables:
        if table.num_rows:
            # With the first rows only: a file without any would be a split of its own.
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            count += table.num_rows
    if writer:
        writer.close()
    return count


def _write_lines(tables: Iterator[pa.Table], path: Path) -> int:
    """Write tables as JSON lines in the form that data sets with tools have, unless they hold no row; how many rows."""
    lines = [json.dumps(with_calls(row), ensure_ascii=False) for table in tables for row in table.to_pylist()]
    if lines:
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return len(lines)


def with_calls(row: Row) -> Row:
    """A pair with the calls of its messages as tables, and the tools in a column of their own."""
    sides = {name: template_form(row[name]) for name in ("prompt", *SIDES)}
    return {**row, **sides, **({TOOLS: tools} if (tools := tools_of(row["prompt"])) else {})}


def _answers(stage: StageFolder, job: Job, made: Path) -> dict[str, int]:
    generators = {"start": job.student.described, "trained": job.name}
    rows = stage.table(columns=[ID_COLUMN, "prompt", *generators]).sort_by(ID_COLUMN).to_pylist()
    for side, generator in generators.items():
        outputs = [{"instruction": text_of(row["prompt"]), "output": row[side], "generator": generator} for row in rows]
        (made / f"{side}.json").write_text(json.dumps(outputs, indent=1, ensure_ascii=False), encoding="utf-8")
    return {f"{side}.json": len(rows) for side in generators}
