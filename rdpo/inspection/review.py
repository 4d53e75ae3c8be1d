"""Pairs of a run for people to judge in Argilla, and what they said as a preference data set.

A person sees a prompt and both answers, in an order that is drawn for each pair, and neither the scores nor which one
is preferred. The folder is one that Argilla's `Dataset.from_disk` takes; the answers come back as the JSON that its
`records.to_json` writes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rdpo.errors import InputError
from rdpo.evaluation.intervals import share_interval, with_interval
from rdpo.evaluation.publish import rendered_card
from rdpo.execution.reader import RunReader
from rdpo.files.folder import Folder
from rdpo.files.stores import open_file
from rdpo.inspection.export import REASONING_KEY, with_calls
from rdpo.records import ID_COLUMN, SIDES, Messages, Row, digest, text_of

ASKED = "Which answer is better?"
QUESTION, FIRST, SECOND, EQUAL = "better", "first", "second", "equal"
LABELS = {FIRST: "the first", SECOND: "the second", EQUAL: "neither"}
LARGEST_BYTES = 1 << 30
TIED, UNANSWERED = "as many say the one as the other, or that they are equal", "nobody has answered"


def places(pair_id: str) -> dict[str, str]:
    """Which side of a pair stands where: the same each time, half of the pairs either way."""
    first, second = SIDES if int(digest(pair_id, "review"), 16) % 2 else SIDES[::-1]
    return {FIRST: first, SECOND: second}


def write_review(run_dir: str, target: str, limit: int | None = None, asked: str = ASKED) -> str:
    """Write a run's pairs, or `limit` of them drawn at random, to a new folder for Argilla; what was written.

    Raises:
        InputError: there are no pairs, or the folder is not empty.
    """
    pairs = _pairs_of(run_dir)
    drawn = sorted(pairs, key=lambda name: digest(name, "drawn"))[:limit]
    if not drawn:
        raise InputError(f"{run_dir}: the pairs stage holds no rows; see its dropped reasons")
    folder = Folder(target)
    if folder.files():
        raise InputError(f"{target}: is not empty; name a new folder")

    name = f"{RunReader(run_dir).job.name}-review"
    with folder.made() as made:
        (made / ".argilla").mkdir()
        _write(made / ".argilla" / "settings.json", _settings(asked))
        _write(made / ".argilla" / "dataset.json", {"name": name})
        _write(made / "records.json", [_record(pairs[one]) for one in drawn])
        card = rendered_card("review.md.jinja", name=name, pairs=len(drawn), run_dir=run_dir)
        (made / "README.md").write_text(card, encoding="utf-8")
    return f"{len(drawn)} pairs -> {folder.address()}; its README.md says how to put them to people"


@dataclass
class Reviewed:
    """What people said of pairs."""

    rows: list[Row] = field(default_factory=list)
    """Pairs in the order of the majority: `prompt`, `chosen`, `rejected`, both scores, `votes_for`, `votes_against`."""
    agrees: list[bool] = field(default_factory=list)
    """Of each row, whether the run prefers the same answer."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many pairs are no row, by the reason why."""

    def lines(self) -> Iterator[str]:
        """What came of it, for a person."""
        if self.agrees:
            shares = np.array(self.agrees, dtype=float)[np.newaxis]
            yield f"people agree with the run's order in {with_interval(share_interval(shares), '.2f')} of the pairs"
        for reason, count in self.left_out.items():
            yield f"left out {count}: {reason}"


def read_review(run_dir: str, records: str) -> Reviewed:
    """The pairs of a run in the order that people gave them.

    Args:
        run_dir: the run whose pairs were put to them.
        records: the file that Argilla's `records.to_json` wrote.

    Raises:
        InputError: the file holds something else, or a record of another run.
    """
    pairs, reviewed = _pairs_of(run_dir), Reviewed()
    for number, record in enumerate(_records(records), start=1):
        name = str(record.get("id"))
        if name not in pairs:
            raise InputError(f"{records}: record {number}: {name!r} is no pair of {run_dir}; name the run it came from")
        votes = _votes(record, f"{records}: record {number}")
        side, reason = _majority(votes, places(name))
        if side is None:
            reviewed.left_out[reason] += 1
            continue
        reviewed.rows.append(_ordered(pairs[name], side, votes, places(name)))
        reviewed.agrees.append(side == SIDES[0])
    return reviewed


def write_pairs(reviewed: Reviewed, target: str) -> None:
    """Write the pairs as JSON lines, a preference data set.

    Raises:
        InputError: nobody has preferred an answer, or the file is there already.
    """
    if not reviewed.rows:
        raise InputError("no pair has an answer that most people prefer")
    if Path(target).exists():
        raise InputError(f"{target}: is there already; name a new file")
    lines = [json.dumps(row, ensure_ascii=False) for row in reviewed.rows]
    Path(target).write_text("\n".join([*lines, ""]), encoding="utf-8")


def _pairs_of(run_dir: str) -> dict[str, Row]:
    """The kept pairs of a run by their ids."""
    run = RunReader(run_dir)
    run.require("pairs")
    stage = run.folder("pairs")
    return {row[ID_COLUMN]: row for part in stage.tables() for row in part.to_pylist()}


def _record(pair: Row) -> Row:
    name = pair[ID_COLUMN]
    answers = {place: text_of(pair[side]) for place, side in places(name).items()}
    return {"id": name, "fields": {"prompt": text_of(pair["prompt"]), **answers}}


def _settings(asked: str) -> Row:
    """Fields and questions in Argilla's form. No field is Markdown: what a model wrote stays text."""
    titles = {"prompt": "Prompt", FIRST: "First answer", SECOND: "Second answer"}
    fields = [
        {"name": name, "title": title, "required": True, "type": "text", "settings": _plain("text")}
        for name, title in titles.items()
    ]
    options = [{"value": value, "text": text} for value, text in LABELS.items()]
    label = {"type": "label_selection", "options": options, "visible_options": len(options)}
    better = {"name": QUESTION, "title": asked, "required": True, "type": label["type"], "settings": label}
    why = {"name": "why", "title": "Why?", "required": False, "type": "text", "settings": _plain("text")}
    return {"guidelines": asked, "fields": fields, "questions": [better, why], "allow_extra_metadata": False}


def _plain(kind: str) -> Row:
    return {"type": kind, "use_markdown": False}


def _records(path: str) -> list[Row]:
    try:
        with open_file(path) as file:
            found = json.loads(file.read(LARGEST_BYTES))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no JSON of Argilla's records: {error}") from None
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise InputError(f"{path}: is no list of records; write it with `dataset.records.to_json`")
    return found


def _votes(record: Mapping[str, Any], place: str) -> Counter[str]:
    """How often each label was given."""
    answers = (record.get("responses") or {}).get(QUESTION) or []
    votes = Counter(str(answer.get("value")) for answer in answers)
    if unknown := set(votes) - set(LABELS):
        raise InputError(f"{place}: {QUESTION}: {sorted(unknown)[0]!r} is none of {', '.join(LABELS)}")
    return votes


def _majority(votes: Counter[str], where: Mapping[str, str]) -> tuple[str | None, str]:
    """The side that more people prefer than all others together, or why there is none."""
    if not votes:
        return None, UNANSWERED
    for place, side in where.items():
        if 2 * votes[place] > votes.total():
            return side, ""
    return None, TIED


def _ordered(pair: Row, chosen: str, votes: Counter[str], where: Mapping[str, str]) -> Row:
    """A row of the data set, whose chosen answer is that side of the pair."""
    rejected = SIDES[chosen == SIDES[0]]
    answers = {side: _thought(pair, side) for side in SIDES}
    count = {side: votes[place] for place, side in where.items()}
    row = {
        "prompt": pair["prompt"],
        "chosen": answers[chosen],
        "rejected": answers[rejected],
        "score_chosen": pair[f"score_{chosen}"],
        "score_rejected": pair[f"score_{rejected}"],
        "votes_for": count[chosen],
        "votes_against": count[rejected],
    }
    return with_calls(row)


def _thought(pair: Row, side: str) -> Messages:
    """The messages of an answer, with the reasoning before it where there is some."""
    thought = pair.get(f"{side}_reasoning")
    return [{**pair[side][0], REASONING_KEY: thought}] if thought else pair[side]


def _write(path: Path, content: Row | Sequence[Row]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
