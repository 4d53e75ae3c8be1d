"""The outputs of a reward model's head, and which of them make its score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rdpo.errors import InputError, did_you_mean
from rdpo.preference.scores import Composed, Score

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHOWN = 40
"""How many labels a message names at most."""


@dataclass(frozen=True)
class Outputs:
    """Places and weights of those that count, by name; none where the model has one output, which is the score."""

    places: Mapping[str, int]
    weights: Mapping[str, float]

    def score(self, values: Sequence[float]) -> Score:
        """The score of the outputs of one conversation, (outputs,): their weighted sum, with each beside it."""
        if not self.places:
            [value] = values
            return value
        named = {name: values[place] for name, place in self.places.items()}
        return Composed(sum(weight * named[name] for name, weight in self.weights.items()), named)


def outputs_of(where: str, weights: Mapping[str, float], config: PretrainedConfig) -> Outputs:
    """The outputs that a table names, by the labels of the configuration or by positions from 0 on.

    Raises:
        InputError: there is no such output, one is named twice, or none where there are several.
    """
    labels = [str((config.id2label or {}).get(place, place)) for place in range(config.num_labels)]
    if not weights and config.num_labels != 1:
        raise InputError(
            f"{where} has {config.num_labels} outputs; name those that count with their weights, as "
            f"outputs = {{ {_key(labels[0])} = 1.0 }}; there are {_named(labels)}"
        )

    places: dict[str, int] = {}
    for name in weights:
        place = _place(where, name, labels)
        if place in places.values():
            raise InputError(f"{where}: outputs name {labels[place]!r} twice; give one of the two")
        places[name] = place
    return Outputs(places, weights)


def _place(where: str, name: str, labels: list[str]) -> int:
    found = {place for place, label in enumerate(labels) if label == name}
    if name.isdecimal() and int(name) < len(labels):
        found.add(int(name))
    if not found:
        raise InputError(
            f"{where} has no output {name!r}{did_you_mean(name, labels)}; there are {_named(labels)}, or positions "
            f"from 0 to {len(labels) - 1}"
        )
    if len(found) > 1:
        raise InputError(
            f"{where}: {name!r} may be any of the outputs {sorted(found)}; write another label or position"
        )
    return found.pop()


def _named(labels: list[str]) -> str:
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return ", ".join(labels[:SHOWN]) + more


def _key(label: str) -> str:
    """A label as a key of TOML."""
    return label if label.replace("_", "").replace("-", "").isalnum() and label.isascii() else f'"{label}"'
