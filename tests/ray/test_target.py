"""A target behind a server, and a function that scores what it answers, through Ray: rows keep their places."""

import pytest

from rdpo.config import Job
from rdpo.preference.rewards import score_answers
from tests.support.chat_server import QUICK, Server, completion

pytestmark = pytest.mark.ray


def test_rows_get_the_negated_scores_of_the_targets_answers(ray_cluster, job_table):
    import ray

    server = Server()
    server.replies = [completion("x" * (1 + n % 5)) for n in range(60)]
    rows = [
        {"prompt_id": f"p{i}", "prompt": [{"role": "user", "content": "Propose."}], "a": f"Why {i}?", "b": f"How {i}?"}
        for i in range(12)
    ]
    within = {"kind": "function", "name": "long", "function": "tests.rewards:fails_on_seven"}
    with server.elsewhere() as address:
        endpoint = {"url": f"{address}/v1", "model": "m", **QUICK}
        target = {"kind": "target", "name": "target", "samples": 2, "endpoint": endpoint, "reward": within}
        job = Job.model_validate({**job_table, "rewards": [target, {**job_table["rewards"][0], "weight": 0.5}]})
        scored = score_answers(ray.data.from_items(rows), job, ["a", "b"]).take_all()

    by_id = {row["prompt_id"]: row for row in scored}
    assert by_id.keys() == {row["prompt_id"] for row in rows}
    lost = by_id.pop("p7")
    assert lost["dropped"] == "reward target: the target's answer to a: reward long: RuntimeError: seven"
    for row in by_id.values():
        assert row["dropped"] is None
        assert row["a_scores"] == {"target": -1.0, "target.long": 1.0, "length": len(row["a"])}
        assert row["a_score"] == -1.0 + 0.5 * len(row["a"])
        assert len(row["a_answered_by_target"]) == 2
        assert row["tokens_read_target"] == 4 * 7
    asked = [one["messages"][-1]["content"] for one in server.asked]
    assert sorted(asked) == sorted(row[name] for row in rows for name in ("a", "b") for _ in range(2))
