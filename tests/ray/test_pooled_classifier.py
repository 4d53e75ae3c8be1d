"""A reward model on a real engine: the scores of the same model through transformers, its prompt read once."""

import pyarrow as pa
import pytest

from rdpo.config import ClassifierReward, Job
from rdpo.preference.rewards import score_answers
from rdpo.preference.rewards.classifier import Classifier

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

ENGINE = {"max_model_len": 512, "kv_cache_gib": 1, "batch_rows": 4, "dtype": "float32"}


def test_an_engine_scores_as_transformers_does(ray_cluster, job_table, tiny_classifier):
    import ray

    reward = {"kind": "classifier", "name": "rm", "model": tiny_classifier, "max_length": 512}
    job = Job.model_validate({**job_table, "rewards": [{**reward, "engine": ENGINE}]})
    rows = [
        {
            "prompt_id": f"p{i}",
            "prompt": [{"role": "user", "content": "why " * (20 * i + 1)}],
            "a": "so",
            "b": "no " * i,
        }
        for i in range(5)
    ]
    # Of a conversation that is too long the last tokens are read.
    rows.append({**rows[0], "prompt_id": "long", "a": "x" * 900})
    found = {row["prompt_id"]: row for row in score_answers(ray.data.from_items(rows), job, ["a", "b"]).take_all()}
    whole = Classifier(ClassifierReward(**reward, dtype="float32"), ["a", "b"])(pa.Table.from_pylist(rows)).to_pylist()
    for row in whole:
        for answer in ("a", "b"):
            assert found[row["prompt_id"]][f"{answer}_scores"]["rm"] == pytest.approx(
                row[f"{answer}_scores"]["rm"], abs=1e-4
            )
    assert len({row["a_score"] for row in found.values()}) == 6
