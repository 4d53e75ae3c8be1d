"""What differs between two runs, A and B: settings, how each stage was made, rows, and results; finished or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rdpo.execution.keys import what_counts
from rdpo.execution.reader import RunReader
from rdpo.files.manifest import Manifest
from rdpo.inspection.results import result_lines
from rdpo.records import ID_COLUMN, SIDES, Row, digest, rows_of
from rdpo.stages.table import NAMES, WITHOUT_ROWS, names_of

SHOWN_CHARS = 48
SHOWN_NAMES = 5
UNSET = "-"


class Side(RunReader):
    """One of the two runs, with the manifests of its finished stages."""

    def __init__(self, run_dir: str):
        super().__init__(run_dir)
        self.manifests = self.finished(names_of(self.job))

    @property
    def rewards(self) -> set[str]:
        """Names of the job's rewards."""
        return {reward.name for reward in self.job.rewards}


def diff_runs(run_dirs: tuple[str, str]) -> list[str]:
    """The differences as lines of text; one line where there is none.

    Raises:
        InputError: one of the directories holds no run.
    """
    a, b = map(Side, run_dirs)
    blocks = {
        "settings": setting_lines(a, b),
        "stages": list(_makings(a, b)),
        "rows": list(_rows(a, b)),
        "results": results(a, b),
    }

    lines = [f"A  {run_dirs[0]}", f"B  {run_dirs[1]}"]
    if not any(blocks.values()):
        return [*lines, "no difference: the same settings, rows and results"]

    for title, block in blocks.items():
        lines += ["", title, *(block or ["the same"])]
    return lines


def results(a: Side, b: Side) -> list[str]:
    """The results side by side as lines of text; none where both runs have the same, or none."""
    return result_lines(a.manifests, b.manifests, _evaluated(a), _evaluated(b))


def _evaluated(side: Side) -> list[Row]:
    folder = side.folder("evaluation")
    if "evaluation" not in side.manifests or not folder.parts():
        return []
    rows: list[Row] = folder.table().sort_by(ID_COLUMN).to_pylist()
    return rows


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted keys, the entries of a list of tables by their names or places."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        value = {str(entry.get("name", place)): entry for place, entry in enumerate(value)}
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, entry in value.items():
        found |= flat(entry, f"{prefix}.{key}" if prefix else key)
    return found


def _changed(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Keys with different values; one that is missing is one that is null."""
    return [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def setting_lines(a: Side, b: Side) -> list[str]:
    """The settings that differ, with both values, as lines of text."""
    of_a, of_b = (flat(side.job.model_dump(mode="json")) for side in (a, b))
    changed = [key for key in _changed(of_a, of_b) if not _of_lone_reward(key, a, b)]
    width = max(map(len, changed), default=0) + 2
    return [
        f"{key:<{width}}{_value(of_a.get(key)):<{SHOWN_CHARS}}  {_value(of_b.get(key))}".rstrip() for key in changed
    ]


def _of_lone_reward(key: str, a: Side, b: Side) -> bool:
    """Whether a key is one of the settings of a reward that one of the runs lacks; its kind stands for them."""
    section, _, rest = key.partition(".")
    name, _, last = rest.partition(".")
    return section == "rewards" and name in a.rewards ^ b.rewards and last != "kind"


def _value(value: object) -> str:
    text = UNSET if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 1]}…"


def _makings(a: Side, b: Side) -> Iterator[str]:
    """How the stages that are not the same making differ in what they were made from."""
    same = [name for name in NAMES if name in a.manifests and _is_same(a, b, name)]
    found = {name: _making(name, a.manifests.get(name), b.manifests.get(name)) for name in NAMES if name not in same}
    changed = {name: text for name, text in found.items() if text}
    if changed and same:
        yield f"the same making: {', '.join(same)}"
    for name, text in changed.items():
        yield f"{name:<12}{text}"


def _is_same(a: Side, b: Side, stage: str) -> bool:
    one, other = a.manifests.get(stage), b.manifests.get(stage)
    return one is not None and other is not None and (one.key, one.digest) == (other.key, other.digest)


def _making(stage: str, a: Manifest | None, b: Manifest | None) -> str:
    if a is None or b is None:
        return "" if a is b else f"finished only in {'B' if a is None else 'A'}"
    reasons = []
    if settings := _changed(flat(what_counts(a.settings)), flat(what_counts(b.settings))):
        more = f" and {len(settings) - SHOWN_NAMES} more" if settings[SHOWN_NAMES:] else ""
        reasons.append(f"other {', '.join(settings[:SHOWN_NAMES])}{more}")
    if inputs := _changed(a.inputs, b.inputs):
        reasons.append(f"from other {', '.join(inputs)}")

    if not reasons:
        reasons.append("the same settings and inputs, made twice")
    reasons += [
        f"{name} {a.versions.get(name, UNSET)} and {b.versions.get(name, UNSET)}"
        for name in _changed(a.versions, b.versions)
    ]
    return "; ".join(reasons)


def _rows(a: Side, b: Side) -> Iterator[str]:
    """Rows that are only in one of the runs, rows dropped, and pairs whose texts differ."""
    for stage in NAMES:
        if stage not in WITHOUT_ROWS and not _is_same(a, b, stage):
            yield from _rows_of(a, b, stage)


def _rows_of(a: Side, b: Side, stage: str) -> Iterator[str]:
    ids = [side.folder(stage).ids(ID_COLUMN) for side in (a, b)]
    if not any(map(len, ids)):
        return
    # Ids are hashes of content: a row that has changed is another row.
    only = [one.filter(pc.invert(pc.is_in(one, other))) for one, other in (ids, reversed(ids))]
    if any(map(len, only)):
        parts = (f"{len(names)} only in {side}{_some(names)}" for side, names in zip("AB", only, strict=True))
        yield f"{stage:<12}{len(ids[0])} and {len(ids[1])} rows: {', '.join(parts)}"

    reasons = [side.folder(stage).reasons() for side in (a, b)]
    for reason in _changed(*reasons):
        counts = [of_side.get(reason, 0) for of_side in reasons]
        yield f"{stage:<12}dropped {counts[0]} and {counts[1]}: {reason}"

    if stage == "pairs":
        yield from _texts(a, b)


def _some(names: pa.ChunkedArray) -> str:
    shown = [name[:8] for name in names[:2].to_pylist()]
    return f" ({', '.join(shown)}{', …' if len(names) > 2 else ''})" if shown else ""


def _texts(a: Side, b: Side) -> Iterator[str]:
    of_a, of_b = map(_answers, (a, b))
    both = [(of_a[name], of_b[name]) for name in of_a if name in of_b]
    other = dict.fromkeys(SIDES, 0)
    for one, two in both:
        for side in SIDES:
            other[side] += one[side] != two[side]

    if any(other.values()):
        parts = ", ".join(f"{count} with another {side} answer" for side, count in other.items())
        yield f"{'pairs':<12}{len(both)} in both: {parts}"


def _answers(side: Side) -> dict[str, dict[str, str]]:
    """Hashes of both answers of each pair, by its id."""
    found = {}
    for row in rows_of(side.folder("pairs").tables(columns=[ID_COLUMN, *SIDES])):
        found[row[ID_COLUMN]] = {name: digest(row[name]) for name in SIDES}
    return found
