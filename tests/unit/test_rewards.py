"""Rewards: expected ratings, a classifier equal to plain transformers, functions that fail."""

import math

import pyarrow as pa
import pytest
import torch
from transformers import LlamaForCausalLM

from rdpo.config import ClassifierReward, FunctionReward, ImplicitReward, Job
from rdpo.errors import InputError
from rdpo.preference.ratings import expected_rating
from rdpo.preference.rewards.classifier import Classifier, checked_classifier
from rdpo.preference.rewards.function import load_function, score_by_function
from rdpo.preference.rewards.implicit import Implicit, checked_implicit
from rdpo.preference.scores import combine_table
from tests.support.models import byte_tokenizer, save_model, tiny_config

PROMPT = [{"role": "user", "content": "why?"}]
ANSWERS = ["because", "I do not know, and nobody else does either.", "x", "rain " * 9]


def classifier(folder, **changes):
    return ClassifierReward(kind="classifier", name="rm", model=folder, dtype="float32", **changes)


def test_expected_rating_weighs_values_by_probability():
    values = {1: 1.0, 5: 5.0}
    assert expected_rating(values, {1: math.log(0.3), 5: math.log(0.1), 9: 0.0}) == pytest.approx(2.0)
    assert math.isnan(expected_rating(values, {9: 0.0}))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_classifier_equals_a_plain_loop_whatever_the_batching(tiny_classifier, batch_size):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    scored = Classifier(classifier(tiny_classifier, batch_size=batch_size), ["a"]).score([PROMPT] * 4, ANSWERS)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_classifier)
    for answer, score in zip(ANSWERS, scored, strict=True):
        ids = tokenizer.apply_chat_template(
            [*PROMPT, {"role": "assistant", "content": answer}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            assert score == pytest.approx(model(**ids).logits.item(), abs=1e-5)


def test_models_without_one_output_are_refused(tiny_model, tmp_path, tokenizer):
    from transformers import LlamaForSequenceClassification

    from tests.support.models import save_model, tiny_config

    with pytest.raises(InputError, match="no classification head"):
        checked_classifier(classifier(tiny_model))
    several = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=3))
    with pytest.raises(InputError, match="3 outputs"):
        checked_classifier(classifier(save_model(tmp_path, several, tokenizer)))


def score_table(name, prompts):
    rows = [{"prompt": [{"role": "user", "content": text}], "answer": "a" * 3} for text in prompts]
    reward = FunctionReward(kind="function", name="f", function=f"tests.rewards:{name}")
    return score_by_function(pa.Table.from_pylist(rows), reward, ["answer"], ".").to_pylist()


def test_function_reward_scores_and_drops_what_it_cannot():
    rows = score_table("fails_on_seven", ["1", "7"])
    assert [row.get("dropped") for row in rows] == [None, "reward f: RuntimeError: seven"]
    assert rows[0]["answer_scores"] == {"f": 1.0}
    assert "not a finite number" in score_table("not_a_number", ["1"])[0]["dropped"]


def test_missing_functions_are_explained():
    with pytest.raises(InputError, match="No module named"):
        load_function("no_such_module:f")
    with pytest.raises(InputError, match="has no attribute"):
        load_function("tests.rewards:nothing")


def test_combined_score_is_the_weighted_sum_without_the_independent_one():
    table = pa.Table.from_pylist([{"a_scores": {"one": 2.0, "two": 10.0, "three": 1.0}}])
    combined = combine_table(table, {"one": 0.5, "two": 0.0, "three": -1.0}, ["a"])
    assert combined["a_score"].to_pylist() == [0.0]


def implicit(models, **changes):
    return ImplicitReward(kind="implicit", name="own", model=models[0], reference=models[1], dtype="float32", **changes)


def plain_logp(folder, prompt_ids, answer_ids):
    from transformers import AutoModelForCausalLM

    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[*prompt_ids, *answer_ids]])).logits[0]
    at = torch.arange(len(prompt_ids) - 1, len(prompt_ids) + len(answer_ids) - 1)
    return float(logits.log_softmax(-1)[at, answer_ids].sum())


@pytest.mark.parametrize("budget", [64, 4096])
def test_implicit_reward_is_beta_times_the_log_ratio(wordy_models, job_table, budget):
    job = Job.model_validate(job_table)
    reward = implicit(wordy_models, beta=0.3, tokens_per_batch=budget)
    rows = [{"prompt": PROMPT, "answer": text, "answer_finish_reason": "stop"} for text in ANSWERS[:3]]
    rows.append({**rows[0], "answer_finish_reason": "length"})
    actor = Implicit(reward, ["answer"], job)
    scores = actor.score(rows, "answer")
    for row, score in zip(rows, scores, strict=True):
        prompt = actor.ratios.chat.prompt_ids(row["prompt"])
        answer = actor.ratios.chat.completion_ids(row["answer"], row["answer_finish_reason"] == "stop")
        trained, start = (plain_logp(folder, prompt, answer) for folder in wordy_models)
        assert score == pytest.approx(0.3 * (trained - start), abs=1e-4)
    assert scores[0] != scores[3]
    per_token = Implicit(implicit(wordy_models, beta=0.3, normalization="token_mean"), ["answer"], job)
    length = len(actor.ratios.chat.completion_ids(ANSWERS[0], True))
    assert per_token.score(rows, "answer")[0] == pytest.approx(scores[0] / length, abs=1e-5)


def test_implicit_reward_of_a_model_against_itself_is_zero(wordy_models, job_table):
    actor = Implicit(implicit([wordy_models[0]] * 2), ["answer"], Job.model_validate(job_table))
    rows = [{"prompt": PROMPT, "answer": text, "answer_finish_reason": "stop"} for text in ANSWERS]
    assert actor.score(rows, "answer") == [0.0] * 4


def test_models_with_different_tokenizers_are_refused(wordy_models, job_table, tmp_path):
    other = byte_tokenizer(specials=("<a>", "<b>", "<|im_start|>", "<|im_end|>"))
    save_model(tmp_path / "other", LlamaForCausalLM(tiny_config(other)), other)
    with pytest.raises(InputError, match="have different tokenizers"):
        checked_implicit(implicit([wordy_models[0], str(tmp_path / "other")]), Job.model_validate(job_table))
