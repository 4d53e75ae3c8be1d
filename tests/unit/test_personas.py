"""Personas and topics: which combination is whose, and what cannot be drawn from."""

import math
from collections import Counter
from itertools import product

import pytest

from rdpo.config import Made
from rdpo.errors import InputError
from rdpo.synthesis import personas
from rdpo.synthesis.personas import Combinations, check_question, combinations, shuffled
from tests.support.jobs import write_jsonl


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 63, 100, 1000])
def test_a_shuffle_has_every_place_once(count):
    assert sorted(shuffled(place, count, 7, "x") for place in range(count)) == [*range(count)]


def test_a_shuffle_looks_drawn_at_random():
    """Where one place comes to lie, over many seeds: uniform, by a chi-squared of 11 degrees below its 0.9999 point."""
    drawn = Counter(shuffled(5, 12, seed, "x") for seed in range(6000))
    assert sum((drawn[place] - 500) ** 2 / 500 for place in range(12)) < 37.4
    # Neighbours do not stay neighbours.
    steps = Counter((shuffled(n + 1, 100, 1, "x") - shuffled(n, 100, 1, "x")) % 100 for n in range(99))
    assert max(steps.values()) < 8


def test_combinations_are_drawn_once_each_before_any_comes_again():
    drawn = Combinations(("nurse", "pilot", "poet"), ("rain", "bread"), 3)
    rows = [drawn.of(number) for number in range(1, 13)]
    found = [(row["persona"], row["topic"]) for row in rows]
    every = set(product(drawn.personas, drawn.topics))
    assert set(found[:6]) == set(found[6:]) == every
    assert found[:6] != found[6:]
    assert found != [tuple(Combinations(drawn.personas, drawn.topics, 4).of(n).values()) for n in range(1, 13)]


def test_a_combination_of_very_many_is_found_without_a_list():
    many = Combinations(tuple(map(str, range(50_000))), tuple(map(str, range(40_000))), 0)
    found = {tuple(many.of(number).values()) for number in range(1, 400)}
    assert len(found) == 399
    assert math.isclose(sum(int(one) for one, _ in found) / 399, 25_000, rel_tol=0.1)


def made(tmp_path, template="As {{ persona }}, on {{ topic }}, no. {{ number }}", **more):
    write_jsonl(tmp_path / "who.jsonl", [{"who": "nurse"}, {"who": "pilot"}, {"who": " nurse "}])
    write_jsonl(tmp_path / "what.jsonl", [{"what": "rain"}, {"what": "bread"}])
    table = {
        "kind": "personas",
        "count": 4,
        "template": template,
        "personas": {"source": str(tmp_path / "who.jsonl"), "column": "who"},
        "topics": {"source": str(tmp_path / "what.jsonl"), "column": "what"},
    }
    return Made.model_validate({**table, **more})


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("About {{ topic }}", "no place for the persona"),
        ("As {{ persona }}", "no place for the topic"),
        ("{{ persona }} {{ topic }} {{ mood }}", "uses mood, and there are only persona, topic and number"),
        ("{{ persona }} {{ topic", "template"),
    ],
)
def test_a_question_that_asks_for_nothing_of_them_is_refused(tmp_path, template, said):
    with pytest.raises(InputError, match=f"prompts.made.template.*{said}"):
        check_question(made(tmp_path, template))


class Rows:
    """Raw rows as Ray Data gives them: in blocks of any order."""

    def __init__(self, *blocks):
        self.blocks = blocks

    def iter_batches(self, batch_format):
        import pyarrow as pa

        return [pa.Table.from_pylist(block) for block in self.blocks]


def raw(line, text, problem=None):
    return {"source": "who.jsonl", "line": line, "raw": text, "problem": problem}


def test_texts_are_read_in_their_order_each_once(tmp_path, monkeypatch):
    blocks = [[raw(3, '{"who": " nurse ", "what": "x"}')], [raw(1, '{"who": "nurse", "what": "y"}')]]
    monkeypatch.setattr(personas, "raw_rows", lambda settings, reading: Rows(*blocks))
    drawn = combinations(made(tmp_path), 5)
    assert (drawn.personas, drawn.topics, drawn.seed) == (("nurse",), ("y", "x"), 5)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (raw(7, '{"who": "  "}'), "who.jsonl:7: no text in column `who`"),
        (raw(7, '{"who": 4}'), "no text in column `who`"),
        (raw(7, None, "not JSON"), "who.jsonl:7: not JSON; correct or remove this row"),
    ],
)
def test_a_row_without_text_is_refused_by_its_place(tmp_path, monkeypatch, row, said):
    monkeypatch.setattr(personas, "raw_rows", lambda settings, reading: Rows([row]))
    with pytest.raises(InputError, match=f"prompts.made.personas: .*{said}"):
        combinations(made(tmp_path), 0)
