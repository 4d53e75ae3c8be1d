"""How far rewards agree with the teacher's direction, also where a reward scored only some rows."""

import pyarrow as pa

from rdpo.config import Pairs
from rdpo.preference.agreement import agreement
from rdpo.preference.pairs import exchanged, pair_row
from rdpo.records import table_of


def table(*pairs):
    rows = [
        {"chosen_from": "chosen", "rejected_from": "rejected", "chosen_scores": chosen, "rejected_scores": rejected}
        for chosen, rejected in pairs
    ]
    return pa.Table.from_pylist(rows)


SETTINGS = Pairs(chosen="chosen", rejected="rejected")


def test_a_reward_is_counted_over_the_rows_that_it_scored():
    scored = table(({"rm": 1.0}, {"rm": 2.0}), ({"given": 3.0, "rm": 2.0}, {"given": 1.0, "rm": 1.0}), (None, None))
    found = agreement([scored, pa.concat_tables([scored, scored])], SETTINGS)
    assert found["rm"].preferred == 0.5
    assert (found["given"].preferred, found["given"].chosen_mean, found["given"].rejected_mean) == (1.0, 3.0, 1.0)


def swapped(number, flipped):
    row = {"prompt_id": f"p{number}", "prompt": [{"role": "user", "content": f"why {number}?"}]}
    for name, score in {"response_1": 4.0, "response_2": 1.0}.items():
        row |= {name: name, f"{name}_score": score, f"{name}_scores": {"rm": score}, f"{name}_finish_reason": "stop"}
    pair = pair_row(row, Pairs(chosen="best", rejected="worst"))
    return exchanged(pair) if flipped else pair


def test_the_best_sample_is_the_teachers_choice_also_in_a_flipped_pair():
    pairs = [swapped(number, flipped=number < 3) for number in range(4)]
    found = agreement([table_of(pairs)], Pairs(chosen="best", rejected="worst"))["rm"]
    assert (found.preferred, found.chosen_mean, found.rejected_mean) == (1.0, 4.0, 1.0)


def test_pairs_that_do_not_say_whether_they_were_swapped_are_known_by_their_names():
    pair = {"chosen_from": "rejected", "rejected_from": "chosen"}
    pair |= {"chosen_scores": {"rm": 1.0}, "rejected_scores": {"rm": 2.0}}
    assert agreement([pa.Table.from_pylist([pair])], SETTINGS)["rm"].preferred == 1.0


def test_a_reward_that_scored_one_side_alone_is_not_counted():
    assert agreement([table(({"rm": 1.0, "given": 2.0}, {"rm": 2.0}))], SETTINGS).keys() == {"rm"}
