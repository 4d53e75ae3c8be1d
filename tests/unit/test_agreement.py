"""How far rewards agree with the teacher's direction, also where a reward scored only some rows."""

import pyarrow as pa

from rdpo.config import Pairs
from rdpo.preference.agreement import agreement


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


def test_a_reward_that_scored_one_side_alone_is_not_counted():
    assert agreement([table(({"rm": 1.0, "given": 2.0}, {"rm": 2.0}))], SETTINGS).keys() == {"rm"}
