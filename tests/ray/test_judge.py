"""The judge with a real engine: scores inside the scale, the same again, one for each answer."""

import pytest

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.files.stage_folder import StageFolder
from rdpo.files.unfinished import raise_end
from rdpo.preference.rewards import score_answers
from tests.support.chat_server import QUICK, Server, first_token

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.long
def test_judge_gives_expected_ratings(ray_cluster, job_table):
    import ray

    rubric = "Question: {{ prompt }}\nAnswer: {{ answer }}\nRate the answer from 1 to 5."
    engine = {"max_model_len": 512, "kv_cache_gib": 1, "batch_rows": 4}
    judge = {"kind": "judge", "name": "judge", "rubric": rubric, "prefill": "Rating: ", "engine": engine}
    job = Job.model_validate({**job_table, "rewards": [judge, {**job_table["rewards"][0], "weight": 0.5}]})
    rows = [
        {"prompt_id": f"p{i}", "prompt": [{"role": "user", "content": f"q{i}"}], "answer": "yes " * (1 + i % 3)}
        for i in range(6)
    ]
    rows.append({"prompt_id": "long", "prompt": [{"role": "user", "content": "q"}], "answer": "x" * 600})
    scored = score_answers(ray.data.from_items(rows), job, ["answer"]).take_all()
    by_id = {row["prompt_id"]: row for row in scored}
    assert "fills engine.max_model_len" in by_id.pop("long")["dropped"]
    ratings = {name: row["answer_scores"]["judge"] for name, row in by_id.items()}
    assert all(1 < rating < 5 for rating in ratings.values())
    assert len(set(ratings.values())) > 1
    for row in by_id.values():
        scores = row["answer_scores"]
        assert row["answer_score"] == pytest.approx(scores["judge"] + 0.5 * scores["length"])


def test_rows_that_a_servers_end_leaves_without_scores_stay_to_be_done_and_no_other_reward_sees_them(
    ray_cluster, job_table, tmp_path
):
    import ray

    server = Server(first_token({"4": -0.1, "5": -2.4}), *[402] * 40)
    folder = StageFolder(str(tmp_path), "rewards")
    folder.begin("k")
    rows = [{"prompt_id": f"p{i}", "prompt": [{"role": "user", "content": "q"}], "answer": "yes"} for i in range(9)]
    with server.elsewhere() as address:
        endpoint = {"url": f"{address}/v1", "model": "m", "concurrency": 1, **QUICK}
        judge = {"kind": "judge", "name": "judge", "rubric": "{{ prompt }} {{ answer }}", "ratings": ["4", "5"]}
        judge["endpoint"] = endpoint
        job = Job.model_validate({**job_table, "rewards": [judge, *job_table["rewards"]]})
        [scored] = score_answers(ray.data.from_items(rows), job, ["answer"], folder=folder).take_all()
    assert scored["answer_scores"] == {"judge": pytest.approx(4, abs=0.2), "length": 3.0}
    assert scored["tokens_read_judge"] == 7
    with pytest.raises(InputError, match="refuses the key"):
        raise_end(folder)
    # What was asked after the end of the account is one question.
    assert len(server.asked) <= 3


@pytest.mark.long
def test_a_judge_that_can_write_nothing_else_rates(ray_cluster, job_table):
    """A random model writes no rating by itself."""
    import ray

    engine = {"max_model_len": 1024, "kv_cache_gib": 1, "batch_rows": 4}
    schema = {"type": "object", "properties": {"rating": {"enum": [1, 2, 3]}}, "required": ["rating"]}
    judge = {"kind": "judge", "name": "judge", "rubric": "Rate: {{ answer }}", "engine": engine, "score": "json"}
    judge |= {"ratings": ["1", "2", "3"], "json_schema": schema, "sampling": {"temperature": 1.0, "max_tokens": 64}}
    job = Job.model_validate({**job_table, "rewards": [judge]})
    rows = [{"prompt_id": f"p{i}", "prompt": [{"role": "user", "content": "q"}], "answer": "a" * i} for i in range(12)]
    scored = score_answers(ray.data.from_items(rows), job, ["answer"]).take_all()
    ratings = [row["answer_scores"]["judge"] for row in scored if not row["dropped"]]
    # White space is allowed in JSON, and may fill a reply.
    assert len(ratings) > 6
    assert set(ratings) <= {1.0, 2.0, 3.0}
    assert len(set(ratings)) > 1
