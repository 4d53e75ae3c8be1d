"""Adapters are trained and merged exactly, or their targets are refused."""

import pytest
import torch
from transformers import LlamaForCausalLM

from rdpo.config import Lora
from rdpo.errors import InputError
from rdpo.modeling.adapters import check_reached
from rdpo.modeling.model import ForwardSettings, Tuning, as_policy
from tests.support.models import llama, tiny_config
from tests.support.students import checked, job_of

SETTINGS = ForwardSettings("float32", 8)
REFUSED = {
    "tied embedding": (["q_proj", "embed_tokens"], True, "embed_tokens shares its weights with another layer"),
    "tied head": (["q_proj", "lm_head"], True, "lm_head is the output layer"),
    "head": (["lm_head"], False, "lm_head is the output layer"),
    "by pattern": (r".*(q_proj|lm_head)", False, "lm_head is the output layer"),
    "mistyped": (["q_proj", "qproj"], False, "LlamaForCausalLM has no module qproj"),
    "none": (["query"], False, "not found in the base model"),
    "no linear layer": (["input_layernorm"], False, "is not supported"),
    "no pattern": ("q_proj(", False, "unterminated subpattern"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_targets_that_cannot_be_trained_exactly_are_refused_before_work(case, tmp_path, tokenizer):
    targets, tied, says = REFUSED[case]
    model = llama(tmp_path / "model", tokenizer, tie_word_embeddings=tied)
    job = job_of(model, tmp_path, training={"lora": {"rank": 2, "target_modules": targets}, "zero_stage": 0})
    with pytest.raises(InputError, match=f"training.lora.target_modules: .*{says}"):
        checked(job)


@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens", "q_proj"], ["model.layers.1.mlp.up_proj"]])
def test_targets_that_can_are_taken(targets, tmp_path, tokenizer):
    model = llama(tmp_path / "model", tokenizer, tie_word_embeddings=False)
    checked(job_of(model, tmp_path, training={"lora": {"rank": 2, "target_modules": targets}}))


def test_an_adapter_that_no_gradient_reaches_is_named(tokenizer):
    model = LlamaForCausalLM(tiny_config(tokenizer))
    model.model.layers[1].aside = torch.nn.Linear(4, 4)
    policy = as_policy(model, SETTINGS, Tuning(Lora(rank=2, target_modules=["q_proj", "aside"])))
    hidden = policy.hidden_states(policy.batch([[1, 2]], [[3]], [[4]]))
    with pytest.raises(InputError, match=r"no gradient reaches model.layers.1.aside, which would not be trained"):
        check_reached(policy.model, hidden)
