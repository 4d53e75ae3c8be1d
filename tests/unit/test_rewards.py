"""Rewards: expected ratings, a classifier equal to plain transformers, functions that fail."""

import math

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers import BertForSequenceClassification as Bert
from transformers import RobertaForSequenceClassification as Roberta

from rdpo.config import ClassifierReward, FunctionReward, ImplicitReward, Job
from rdpo.errors import InputError
from rdpo.preference.ratings import expected_rating
from rdpo.preference.rewards import reward_pools
from rdpo.preference.rewards.classifier import Classifier
from rdpo.preference.rewards.classifier_input import checked_classifier
from rdpo.preference.rewards.function import load_function, score_by_function
from rdpo.preference.rewards.implicit import Implicit, ImplicitKind, checked_implicit, reference_of
from rdpo.preference.scores import combine_table
from tests.support.adapters import adapter_on
from tests.support.classifiers import ANSWERS, PROMPT, classifier, edit_config
from tests.support.models import CHATML, byte_tokenizer, save_model, tiny_config


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


def test_an_engine_says_itself_where_it_runs():
    base = {"kind": "classifier", "name": "rm", "model": "m"}
    with pytest.raises(ValueError, match=r"gpus = 4: one actor uses one GPU; .* engine = \{ gpus = 4 \}"):
        ClassifierReward(**base, gpus=4)
    with pytest.raises(ValueError, match=r"gpus = 1\.5: one actor uses one GPU"):
        ClassifierReward(**base, gpus=1.5)
    with pytest.raises(ValueError, match="gpus: with an engine its own table says that"):
        ClassifierReward(**base, gpus=1, engine={"gpus": 4})
    with pytest.raises(ValueError, match=r"max_length = 4096: engine\.max_model_len = 2048 is less"):
        ClassifierReward(**base, max_length=4096, engine={"gpus": 4})


def test_an_engine_reads_decoders_alone(tmp_path):
    tokenizer = byte_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    folder = save_model(tmp_path, Bert(config), tokenizer)
    checked_classifier(classifier(folder))
    with pytest.raises(InputError, match="head stands on the last token, and BertForSequenceClassification is none"):
        checked_classifier(ClassifierReward(kind="classifier", name="rm", model=folder, engine={}))


def test_the_pool_of_an_engine_is_its_own(job_table):
    reward = {"kind": "classifier", "name": "rm", "model": "m", "engine": {"gpus": 8, "concurrency": 2}}
    [pool] = reward_pools(Job.model_validate({**job_table, "rewards": [reward]}))
    assert (pool.setting, pool.size, pool.gpus) == ("rewards.rm.engine", 2, 8)


def test_models_without_one_output_are_refused(tiny_model, tmp_path, tokenizer):
    from transformers import LlamaForSequenceClassification

    from tests.support.models import save_model, tiny_config

    with pytest.raises(InputError, match="no classification head"):
        checked_classifier(classifier(tiny_model))
    several = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=3))
    with pytest.raises(InputError, match="3 outputs"):
        checked_classifier(classifier(save_model(tmp_path, several, tokenizer)))


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
ENDS_WITH_EOS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"


def saved_classifier(folder, template=CHATML, tokenizer=None, **changes):
    """A random Llama with a head, whose scores differ well beyond the tolerance."""
    torch.manual_seed(1)
    tokenizer = tokenizer or byte_tokenizer(template)
    config = tiny_config(tokenizer, **{"num_labels": 1, "initializer_range": 0.1, **changes})
    return save_model(folder, LlamaForSequenceClassification(config), tokenizer)


def alone(folder, ids):
    """The score of a model of transformers that is called with one conversation."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


@pytest.mark.parametrize("pad", ["none", "own", "beyond", "eos"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_score_is_that_of_the_model_called_alone_where_pad_is_eos(tmp_path, pad, batch_size):
    tokenizer = byte_tokenizer(ENDS_WITH_EOS)
    pad_id = {"none": None, "own": 5, "beyond": -1, "eos": tokenizer.eos_token_id}[pad]
    folder = saved_classifier(tmp_path, tokenizer=tokenizer, pad_token_id=5)
    edit_config(folder, pad_token_id=pad_id)
    actor = Classifier(classifier(folder, batch_size=batch_size), ["a"])
    assert actor.model.config.pad_token_id == pad_id
    scores = actor.score([PROMPT] * 4, ANSWERS)
    assert len(set(scores)) == 4
    for answer, score in zip(ANSWERS, scores, strict=True):
        ids = actor.input_ids(PROMPT, answer)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert score == pytest.approx(alone(folder, ids), abs=1e-5)


def test_a_model_without_a_pad_token_reads_one_conversation_at_a_time(tmp_path):
    tokenizer = byte_tokenizer(ENDS_WITH_EOS)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, num_labels=1, initializer_range=0.5)
    folder = save_model(tmp_path, GPT2ForSequenceClassification(config), tokenizer)
    actor = Classifier(classifier(folder), ["a"])
    for answer, score in zip(ANSWERS, actor.score([PROMPT] * 4, ANSWERS), strict=True):
        assert score == pytest.approx(alone(folder, actor.input_ids(PROMPT, answer)["input_ids"]), abs=1e-5)


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_numbers(tmp_path, tokenizer):
    headless = save_model(tmp_path / "headless", LlamaForCausalLM(tiny_config(tokenizer)), tokenizer)
    edit_config(headless, architectures=["LlamaForSequenceClassification"])
    renamed = saved_classifier(tmp_path / "renamed")
    weights = {key.replace("layers.1", "layers.9"): of for key, of in load_file(f"{renamed}/model.safetensors").items()}
    save_file(weights, f"{renamed}/model.safetensors", metadata={"format": "pt"})
    narrow = saved_classifier(tmp_path / "narrow")
    edit_config(narrow, intermediate_size=64)

    with pytest.raises(
        InputError, match=r"rewards.rm: .*of the 21 tensors .* 1 is not in the weights .*: score.weight"
    ):
        checked_classifier(classifier(headless))
    with pytest.raises(
        InputError, match=r"9 are not in the weights .* and 6 more; 9 are stored that it has no place for"
    ):
        checked_classifier(classifier(renamed))
    with pytest.raises(InputError, match=r"6 are stored in another shape: .*\(64, 128\) for \(64, 64\)"):
        checked_classifier(classifier(narrow))


def test_a_head_of_one_output_is_taken_where_the_configuration_is_silent(tmp_path):
    folder = saved_classifier(tmp_path / "one")
    expected = Classifier(classifier(folder), ["a"]).score([PROMPT], ["x"])
    edit_config(folder, id2label=None, label2id=None, num_labels=None)
    assert Classifier(classifier(folder), ["a"]).score([PROMPT], ["x"]) == expected
    two = saved_classifier(tmp_path / "two", num_labels=2)
    with pytest.raises(InputError, match="2 outputs"):
        checked_classifier(classifier(two))


def test_token_ids_beyond_the_embedding_are_refused(tmp_path):
    tokenizer = byte_tokenizer()
    folder = saved_classifier(tmp_path, tokenizer=tokenizer)
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"embedding has 258 rows, and 2 ids of the tokenizer, up to 259, lie beyond"):
        checked_classifier(classifier(folder))


def test_a_row_that_the_template_refuses_is_dropped_with_the_reason_and_no_other(tmp_path):
    folder = saved_classifier(tmp_path, NO_SYSTEM)
    system = [{"role": "system", "content": "s"}, *PROMPT]
    table = pa.Table.from_pylist([{"prompt": prompt, "a": "x", "b": "y"} for prompt in (PROMPT, system)])
    scored = Classifier(classifier(folder), ["a", "b"])(table).to_pylist()
    reason = "reward rm: chat template refuses the conversation: System role not supported"
    assert [row["dropped"] for row in scored] == [None, reason]
    assert math.isfinite(scored[0]["b_scores"]["rm"])


def test_a_system_message_that_the_template_refuses_in_every_prompt_is_said_before_the_work(tmp_path):
    folder = saved_classifier(tmp_path, NO_SYSTEM)
    checked_classifier(classifier(folder))
    checked_classifier(classifier(folder, answer_only=True), "Be kind.")
    with pytest.raises(InputError, match=r"System role not supported; every prompt has .* prompts.system"):
        checked_classifier(classifier(folder), "Be kind.")


@pytest.mark.parametrize(("kind", "table"), [(Bert, 64), (Roberta, 66)])
def test_a_text_beyond_the_positions_is_read_by_its_last_tokens(tmp_path, tokenizer, kind, table):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": table, "num_labels": 1, "pad_token_id": 1}
    folder = save_model(tmp_path, kind(kind.config_class(**sizes, **settings)), tokenizer)
    actor = Classifier(classifier(folder, answer_only=True), ["a"])
    assert len(actor.input_ids(PROMPT, "word " * 99)["input_ids"]) == 64
    scores = actor.score([PROMPT] * 3, ["short", "long " * 60, ("long " * 60)[-64:]])
    assert all(map(math.isfinite, scores))
    assert scores[1] == pytest.approx(scores[2], abs=1e-6)


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
        prompt = actor.chat.prompt_ids(row["prompt"])
        answer = actor.chat.completion_ids(row["answer"], row["answer_finish_reason"] == "stop")
        trained, start = (plain_logp(folder, prompt, answer) for folder in wordy_models)
        assert score == pytest.approx(0.3 * (trained - start), abs=1e-4)
    assert scores[0] != scores[3]
    per_token = Implicit(implicit(wordy_models, beta=0.3, normalization="token_mean"), ["answer"], job)
    length = len(actor.chat.completion_ids(ANSWERS[0], True))
    assert per_token.score(rows, "answer")[0] == pytest.approx(scores[0] / length, abs=1e-5)


def test_implicit_reward_of_a_model_against_itself_is_zero(wordy_models, job_table):
    actor = Implicit(implicit([wordy_models[0]] * 2), ["answer"], Job.model_validate(job_table))
    rows = [{"prompt": PROMPT, "answer": text, "answer_finish_reason": "stop"} for text in ANSWERS]
    assert actor.score(rows, "answer") == [0.0] * 4


def test_the_reference_of_an_implicit_reward_may_have_an_adapter(wordy_models, job_table, tmp_path, monkeypatch):
    monkeypatch.setenv("RDPO_CACHE", str(tmp_path / "cache"))
    job, adapter = Job.model_validate(job_table), adapter_on(wordy_models[1], tmp_path / "sft")
    rows = [{"prompt": PROMPT, "answer": text, "answer_finish_reason": "stop"} for text in ANSWERS[:2]]
    worn = implicit(wordy_models, reference_adapter=adapter)
    merged = implicit([wordy_models[0], str(reference_of(worn, job).folder())])
    plain, with_adapter, with_merged = (
        Implicit(reward, ["answer"], job).score(rows, "answer") for reward in (implicit(wordy_models), worn, merged)
    )
    assert with_adapter == with_merged != plain
    before = implicit_settings(worn, job)
    adapter_on(wordy_models[1], tmp_path / "sft", rank=2)
    assert implicit_settings(worn, job) != before

    other = adapter_on(wordy_models[0], tmp_path / "other")
    with pytest.raises(InputError, match=rf"rewards\.own: {other}: was trained on {wordy_models[0]}"):
        checked_implicit(implicit(wordy_models, reference_adapter=other), job)
    with pytest.raises(ValueError, match="reference_adapter: give the model that it is on as reference"):
        ImplicitReward(kind="implicit", name="own", model="a", reference_adapter="sft")


def implicit_settings(reward, job):
    return ImplicitKind(reward).settings(job)


def test_models_with_different_tokenizers_are_refused(wordy_models, job_table, tmp_path):
    other = byte_tokenizer(specials=("<a>", "<b>", "<|im_start|>", "<|im_end|>"))
    save_model(tmp_path / "other", LlamaForCausalLM(tiny_config(other)), other)
    with pytest.raises(InputError, match="have different tokenizers"):
        checked_implicit(implicit([wordy_models[0], str(tmp_path / "other")]), Job.model_validate(job_table))
