"""The judge with a real engine: scores inside the scale, the same again, one for each answer."""

import pytest

from rdpo.config import Job
from rdpo.preference.rewards import score_answers

pytestmark = [pytest.mark.ray, pytest.mark.slow]


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
