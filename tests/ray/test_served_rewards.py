"""Real vLLM servers on loopback as judge and as reward model: the scores are those of the same models without one."""

import asyncio
import shutil

import pyarrow as pa
import pytest
from pydantic import SecretStr

from rdpo.config import EndpointReward, Job, JudgeReward
from rdpo.preference.rewards import score_answers
from rdpo.preference.rewards.classifier import Classifier
from rdpo.preference.rewards.endpoint import ServedReward
from rdpo.preference.rewards.judge_endpoint import ServedJudge
from tests.support.classifiers import classifier
from tests.support.crash_counts import NoCrashCounts
from tests.support.models import byte_tokenizer
from tests.support.vllm_server import serving

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

RUBRIC = "Question: {{ prompt }}\nAnswer: {{ answer }}\nRate the answer from 1 to 5."
PAIR = "{{ prompt }}\nA: {{ first }}\nB: {{ second }}\nWhich is better?"
CRITERIA = [{"name": "short", "text": "Is it short?", "weight": 2}, {"name": "kind", "text": "Is it kind?"}]
# Each starts an engine, so that few say much.
JUDGES = {
    "criteria": {"rubric": RUBRIC + " {{ criterion }}", "criteria": CRITERIA},
    "pairs": {"rubric": PAIR, "pairwise": True, "ratings": ["A", "B"], "prefill": "Better: "},
}
WRITTEN = {"rubric": RUBRIC, "score": "written", "sampling": {"max_tokens": 40, "temperature": 0.0}}
ROWS = [
    {
        "prompt_id": f"p{number}",
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "a": "yes " * (1 + number % 3),
        "b": "Perhaps.",
    }
    for number in range(5)
]


@pytest.fixture(scope="module")
def judge_server(tiny_model, tmp_path_factory):
    """Base URL of a server with the judge."""
    with serving(tiny_model, tmp_path_factory.mktemp("judge"), "judge") as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def reward_server(tiny_classifier, tmp_path_factory):
    """Base URL of a server with the reward model."""
    with serving(tiny_classifier, tmp_path_factory.mktemp("reward"), "rm", "--runner", "pooling") as address:
        yield address


def test_a_server_judges_as_an_engine_does(ray_cluster, judge_server, job_table):
    import ray

    engine = {"max_model_len": 1024, "kv_cache_gib": 1, "dtype": "float32", "batch_rows": 4}
    endpoint = {"url": judge_server, "model": "judge"}
    scored = []
    for how in ({"engine": engine}, {"endpoint": endpoint}):
        judges = JUDGES if "engine" in how else {**JUDGES, "written": WRITTEN}
        rewards = [{"kind": "judge", "name": name, **settings, **how} for name, settings in judges.items()]
        job = Job.model_validate({**job_table, "rewards": rewards})
        rows = score_answers(ray.data.from_items(ROWS), job, ["a", "b"]).take_all()
        scored.append({row["prompt_id"]: row for row in rows})

    for name, row in scored[0].items():
        served = scored[1][name]
        assert row["dropped"] is None
        # A random model writes no rating; that a server's replies are an engine's is seen by the teacher's test.
        assert served["dropped"].startswith("reward written: score of a is not a finite number")
        for answer in ("a_scores", "b_scores"):
            own = {reward: score for reward, score in served[answer].items() if reward != "written"}
            assert own == pytest.approx(row[answer], abs=1e-3)
        assert served["tokens_read_criteria"] > 120 and served["tokens_written_criteria"] == 4
    ratings = {row["a_scores"]["criteria.kind"] for row in scored[0].values()}
    assert len(ratings) > 1 and all(1 < rating < 5 for rating in ratings)


def judged(reward, job_table, url, ids=True):
    """Scores by a judge of this process; without `ids` as by a server that does not say the ratings' tokens."""

    async def run():
        job = Job.model_validate(job_table)
        settings = {"kind": "judge", "name": "j", "endpoint": {"url": url, "model": "judge"}, **reward}
        judge = ServedJudge(JudgeReward.model_validate(settings), ["a", "b"], job, NoCrashCounts, SecretStr("none"))
        judge.begun = not ids
        rows = [row async for block in judge(pa.Table.from_pylist(ROWS)) for row in block.to_pylist()]
        return [(row["dropped"], row["a_scores"]["j"]) for row in rows]

    return asyncio.run(run())


def test_twenty_tokens_that_do_not_have_the_ratings_make_none(judge_server, job_table):
    # This judge's choices are flat: twenty tokens do not have its ratings, and that is said.
    assert [dropped for dropped, _ in judged({"rubric": RUBRIC}, job_table, judge_server)] == [None] * len(ROWS)
    for dropped, _ in judged({"rubric": RUBRIC}, job_table, judge_server, ids=False):
        assert "likeliest tokens" in dropped


@pytest.mark.parametrize("api", ["classify", "pooling"])
@pytest.mark.parametrize("rendered_here", [True, False])
@pytest.mark.parametrize("answer_only", [True, False])
def test_a_server_scores_as_the_classifier_does(
    reward_server, tiny_classifier, job_table, api, rendered_here, answer_only
):
    settings = {"answer_only": answer_only, **({"max_length": 300} if rendered_here else {})}
    tokenizer = {"tokenizer": tiny_classifier} if rendered_here else {}
    reward = EndpointReward.model_validate(
        {"kind": "endpoint", "name": "rm", "api": api, "url": reward_server, "model": "rm", **settings, **tokenizer}
    )
    rows = [*ROWS, {**ROWS[0], "prompt_id": "long", "a": "rain " * 100}]

    async def run():
        actor = ServedReward(reward, ["a", "b"], Job.model_validate(job_table), NoCrashCounts, SecretStr("none"))
        return [row async for block in actor(pa.Table.from_pylist(rows)) for row in block.to_pylist()]

    local = Classifier(classifier(tiny_classifier, **settings), ["a", "b"])(pa.Table.from_pylist(rows)).to_pylist()
    for served, expected in zip(asyncio.run(run()), local, strict=True):
        assert (served["dropped"], expected["dropped"]) == (None, None)
        for answer in ("a_scores", "b_scores"):
            assert served[answer] == pytest.approx(expected[answer], abs=1e-4)


def test_pairs_of_texts_are_scored_as_the_classifier_reads_them(tiny_classifier, job_table, tmp_path):
    # A model without a chat template reads prompt and answer as two texts.
    folder = tmp_path / "pairs"
    shutil.copytree(tiny_classifier, folder)
    tokenizer = byte_tokenizer(template=None)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    local = Classifier(classifier(str(folder)), ["a", "b"])(pa.Table.from_pylist(ROWS)).to_pylist()

    with serving(str(folder), tmp_path, "rm", "--runner", "pooling") as address:
        table = {"kind": "endpoint", "name": "rm", "api": "score", "url": address, "model": "rm"}

        async def run():
            reward, job = EndpointReward.model_validate(table), Job.model_validate(job_table)
            actor = ServedReward(reward, ["a", "b"], job, NoCrashCounts, SecretStr("none"))
            return [row async for block in actor(pa.Table.from_pylist(ROWS)) for row in block.to_pylist()]

        served = asyncio.run(run())
    for row, expected in zip(served, local, strict=True):
        assert row.get("unfinished") is None and row["dropped"] is None
        for answer in ("a_scores", "b_scores"):
            assert row[answer] == pytest.approx(expected[answer], abs=1e-4)
