"""A reward model on a real engine: the scores of the same model through transformers, its prompt read once."""

import pyarrow as pa
import pytest
import torch
from transformers import LlamaForSequenceClassification

from rdpo.config import ClassifierReward, Job
from rdpo.preference.rewards import score_answers
from rdpo.preference.rewards.classifier import Classifier
from tests.support.models import save_model, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

ENGINE = {"max_model_len": 512, "kv_cache_gib": 1, "batch_rows": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def models(tiny_classifier, tmp_path_factory, tokenizer):
    """Folders of reward models, by how many outputs they have."""
    torch.manual_seed(4)
    several = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=3))
    return {1: tiny_classifier, 3: save_model(tmp_path_factory.mktemp("several"), several, tokenizer)}


@pytest.mark.parametrize(("outputs", "weights"), [(1, {}), (3, {"LABEL_0": 1.0, "2": -0.5})])
def test_an_engine_scores_as_transformers_does(ray_cluster, job_table, models, outputs, weights):
    import ray

    reward = {"kind": "classifier", "name": "rm", "model": models[outputs], "max_length": 512, "outputs": weights}
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
            assert found[row["prompt_id"]][f"{answer}_scores"] == pytest.approx(row[f"{answer}_scores"], abs=1e-4)
    assert len({row["a_score"] for row in found.values()}) == 6
