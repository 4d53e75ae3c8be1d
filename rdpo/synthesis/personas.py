"""Personas and topics that prompts are asked for, and which of their combinations is drawn for which prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from rdpo.config import Made, Prompts, Texts
from rdpo.errors import InputError
from rdpo.records import Row, clean, draw_seed
from rdpo.synthesis.columns import Needed, Reading
from rdpo.synthesis.instructions import check_template
from rdpo.synthesis.sources import check_source, raw_rows

TEMPLATE = "prompts.made.template"
PERSONA, TOPIC, NUMBER = "persona", "topic", "number"
"""What the template knows, and the columns of a prompt that it was made of."""
ROUNDS = 4
"""Of a Feistel network: from three on its permutations look drawn at random (Luby and Rackoff, 1988)."""


@dataclass(frozen=True)
class Combinations:
    """Personas and topics, each text once, and the seed by which they are drawn together."""

    personas: tuple[str, ...]
    topics: tuple[str, ...]
    seed: int

    def of(self, number: int) -> Row:
        """Persona and topic of the prompt with this number, from 1 on; none are drawn twice before all were."""
        count = len(self.personas) * len(self.topics)
        times, place = divmod(number - 1, count)
        persona, topic = divmod(shuffled(place, count, self.seed, f"combination:{times}"), len(self.topics))
        return {PERSONA: self.personas[persona], TOPIC: self.topics[topic]}


def shuffled(place: int, count: int, seed: int, role: str) -> int:
    """Where a place from 0 to `count` - 1 lies after all were shuffled; no list of them is needed.

    A Feistel network permutes the numbers below a power of four, and what falls outside goes through it again ("cycle
    walking", Black and Rogaway, 2002).
    """
    bits = max(1, -(-(count - 1).bit_length() // 2))
    mask = (1 << bits) - 1
    while True:
        left, right = place >> bits, place & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (draw_seed(seed, str(right), f"{role}:{turn}") & mask)
        place = left << bits | right
        if place < count:
            return place


def texts_of(made: Made) -> dict[str, Texts]:
    """The sources of personas and topics, by the setting that names them; none of another kind."""
    sources = {"personas": made.personas, "topics": made.topics}
    return {f"prompts.made.{name}": texts for name, texts in sources.items() if texts}


def check_texts(made: Made) -> None:
    """Look at the beginnings of both sources.

    Raises:
        InputError: one is missing, or has no such column.
    """
    for setting, texts in texts_of(made).items():
        check_source(*_read_as(texts, setting))


def check_question(made: Made) -> None:
    """Look at the names that the template uses.

    Raises:
        InputError: it is broken, leaves out persona or topic, or uses another name.
    """
    used = check_template(made.template or "", TEMPLATE)
    for name in (PERSONA, TOPIC):
        if name not in used:
            raise InputError(f"{TEMPLATE}: has no place for the {name}; write {{{{ {name} }}}}")
    if unknown := used - {PERSONA, TOPIC, NUMBER}:
        raise InputError(f"{TEMPLATE} uses {min(unknown)}, and there are only {PERSONA}, {TOPIC} and {NUMBER}")


def combinations(made: Made, seed: int) -> Combinations:
    """All personas and topics, read here.

    Raises:
        InputError: a source cannot be read, or has a row without text.
    """
    personas, topics = (_read(texts, setting) for setting, texts in texts_of(made).items())
    return Combinations(personas, topics, seed)


def _read_as(texts: Texts, setting: str) -> tuple[Prompts, Reading]:
    settings = Prompts(**texts.model_dump())
    return settings, Reading(setting, (Needed((texts.column,), f"{setting}.column"),))


def _read(texts: Texts, setting: str) -> tuple[str, ...]:
    """The texts of a source, each once, in its order.

    Raises:
        InputError: it cannot be read, or a row has none.
    """
    found: list[tuple[str, int, str]] = []
    for part in raw_rows(*_read_as(texts, setting)).iter_batches(batch_format="pyarrow"):
        for row in part.to_pylist():
            found.append((row["source"], row["line"], _text(row, texts.column, setting)))
    # Ray gives the rows of several blocks in any order.
    return tuple(dict.fromkeys(text for _, _, text in sorted(found)))


def _text(row: Mapping[str, str], column: str, setting: str) -> str:
    place = f"{setting}: {row['source']}:{row['line']}"
    if row["problem"]:
        raise InputError(f"{place}: {row['problem']}; correct or remove this row")
    text = json.loads(row["raw"]).get(column)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{place}: no text in column `{column}`; correct or remove this row")
    return clean(text).strip()
