"""Rewards on trial: what cannot be had or gives no number is said before the long work; known pairs are counted."""

import io
import json

import pytest

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.execution.pipeline import run_stages
from rdpo.execution.run import Run
from rdpo.stages.table import STAGES
from rdpo.tracking.console import Console
from tests.support.chat_server import QUICK, Server, first_token

pytestmark = pytest.mark.ray


def calibrated(job_table, folder):
    screen = io.StringIO()
    run = Run(Job.model_validate(job_table), str(folder), Console(screen), lambda *_: False)
    run_stages(run, [stage for stage in STAGES if stage.name == "calibration"])
    return run.manifests["calibration"], screen.getvalue()


@pytest.fixture
def pairs(tmp_path):
    lines = [{"prompt": f"q{i}", "chosen": "long answer" if i else "no", "rejected": "short"} for i in range(5)]
    path = tmp_path / "known.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not json\n")
    return str(path)


def test_how_often_each_reward_is_right_on_known_pairs(ray_cluster, job_table, tiny_classifier, pairs, tmp_path):
    model = {"kind": "classifier", "name": "rm", "model": tiny_classifier, "dtype": "float32"}
    job_table |= {"calibration": {"source": pairs}, "rewards": [*job_table["rewards"], model]}
    manifest, said = calibrated(job_table, tmp_path)
    assert manifest.summary["right"]["length"] == 0.8
    assert 0 <= manifest.summary["right"]["rm"] <= 1
    assert "length prefers the better answer in 0.80 of the known pairs" in said
    assert manifest.dropped == {"line is not JSON": 1}


def test_a_reward_model_that_gives_no_number_is_found_before_the_teacher_writes(
    ray_cluster, job_table, tiny_classifier, tmp_path
):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_classifier)
    model.score.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_classifier).save_pretrained(tmp_path / "broken")
    job_table["rewards"] = [{"kind": "classifier", "name": "rm", "model": str(tmp_path / "broken")}]
    with pytest.raises(InputError, match=r"trial on two plain pairs failed: reward rm: .* not a finite number"):
        calibrated(job_table, tmp_path / "run")


def test_functions_and_the_teacher_as_judge_are_not_tried_without_pairs(ray_cluster, job_table, tmp_path):
    job_table["rewards"].append({"kind": "judge", "name": "judge", "rubric": "{{ prompt }} {{ answer }}"})
    manifest, said = calibrated(job_table, tmp_path)
    assert (manifest.rows_in, manifest.summary) == (0, {"right": {}})
    assert "known pairs" in said


def test_a_judge_whose_server_refuses_the_key_is_found_before_the_teacher_writes(ray_cluster, job_table, tmp_path):
    server = Server(*[401] * 9)
    with server.elsewhere() as address:
        endpoint = {"url": f"{address}/v1", "model": "m", **QUICK}
        judge = {"kind": "judge", "name": "judge", "rubric": "{{ prompt }} {{ answer }}", "ratings": ["4", "5"]}
        judge["endpoint"] = endpoint
        job_table["rewards"] = [judge]
        with pytest.raises(InputError, match=r"rewards.judge.endpoint: http.* refuses the key in key_variable"):
            calibrated(job_table, tmp_path / "run")
        server.replies = [first_token({"4": -0.1, "5": -2.4}) for _ in range(9)]
        manifest, _ = calibrated(job_table, tmp_path / "run")
    assert manifest.rows_out == 2
