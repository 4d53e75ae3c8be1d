"""Reward models with several outputs: those that are named count with their weights, and each stands in the row."""

import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, LlamaForSequenceClassification
from transformers import BertForSequenceClassification as Bert

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.preference.rewards.classifier import Classifier, ClassifierKind
from rdpo.preference.rewards.classifier_input import checked_classifier
from tests.support.classifiers import ANSWERS, PROMPT, classifier, edit_config
from tests.support.models import save_model, tiny_config

LABELS = {0: "helpfulness", 1: "verbosity", 2: "2nd look"}


@pytest.fixture(scope="module")
def several(tmp_path_factory, tokenizer):
    """Folder of a random Llama with a head of three outputs."""
    torch.manual_seed(4)
    config = tiny_config(tokenizer, num_labels=3, id2label=LABELS, label2id={name: id for id, name in LABELS.items()})
    return save_model(tmp_path_factory.mktemp("several"), LlamaForSequenceClassification(config), tokenizer)


def outputs_alone(folder, actor, answer):
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([actor.input_ids(PROMPT, answer)["input_ids"]])).logits[0].tolist()


def test_the_score_is_the_weighted_sum_and_each_output_stands_beside_it(several):
    actor = Classifier(classifier(several, outputs={"helpfulness": 1.0, "verbosity": -0.2, "2": 0.0}), ["a"])
    rows = actor(pa.Table.from_pylist([{"prompt": PROMPT, "a": answer} for answer in ANSWERS])).to_pylist()
    for row in rows:
        helpful, verbose, third = outputs_alone(several, actor, row["a"])
        assert row["a_scores"] == pytest.approx(
            {"rm": helpful - 0.2 * verbose, "rm.helpfulness": helpful, "rm.verbosity": verbose, "rm.2": third}, abs=1e-5
        )


def test_encoders_have_several_outputs_too(tmp_path, tokenizer):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 2}
    folder = save_model(tmp_path, Bert(BertConfig(vocab_size=len(tokenizer), **sizes)), tokenizer)
    reward = classifier(folder, outputs={"0": 1.0, "LABEL_1": -1.0}, answer_only=True)
    [score] = Classifier(reward, ["a"]).score([PROMPT], ["x"])
    assert score.score == pytest.approx(score.parts["0"] - score.parts["LABEL_1"])


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({}, r"3 outputs; name those that count with their weights, as outputs = \{ helpfulness = 1.0 \}; there are"),
        (
            {"helpfullness": 1.0},
            r"no output 'helpfullness' \(did you mean `helpfulness`\?\); there are helpfulness, verb",
        ),
        ({"3": 1.0}, "no output '3'; there are helpfulness, verbosity, 2nd look, or positions from 0 to 2"),
        ({"-1": 1.0}, "no output '-1'"),
        ({"verbosity": 1.0, "1": 1.0}, "outputs name 'verbosity' twice"),
    ],
)
def test_outputs_that_there_are_not_are_refused_with_those_there_are(several, outputs, message):
    with pytest.raises(InputError, match=message):
        checked_classifier(classifier(several, outputs=outputs))


def test_a_name_that_means_two_outputs_is_refused(several, tmp_path, tokenizer):
    config = tiny_config(tokenizer, num_labels=2, id2label={0: "1", 1: "other"}, label2id={"1": 0, "other": 1})
    folder = save_model(tmp_path, LlamaForSequenceClassification(config), tokenizer)
    with pytest.raises(InputError, match=r"'1' may be any of the outputs \[0, 1\]; write another label or position"):
        checked_classifier(classifier(folder, outputs={"1": 1.0}))


def test_outputs_are_those_of_the_weights_where_the_configuration_is_silent(several, tmp_path, tokenizer):
    config = tiny_config(tokenizer, num_labels=3)
    folder = save_model(tmp_path, LlamaForSequenceClassification(config), tokenizer)
    edit_config(folder, id2label=None, label2id=None, num_labels=None)
    [score] = Classifier(classifier(folder, outputs={"2": 1.0}), ["a"]).score([PROMPT], ["x"])
    assert score.parts == {"2": score.score}


def test_outputs_count_for_the_key_only_where_there_are_some(several, tiny_classifier, job_table):
    job = Job.model_validate(job_table)
    assert "outputs" not in ClassifierKind(classifier(tiny_classifier)).settings(job)
    one, other = (classifier(several, outputs={"verbosity": weight}) for weight in (1.0, 2.0))
    assert ClassifierKind(one).settings(job) != ClassifierKind(other).settings(job)
    with pytest.raises(ValueError, match="outputs: every weight is 0"):
        classifier(several, outputs={"verbosity": 0.0})
