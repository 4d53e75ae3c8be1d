"""Adapters are trained and merged exactly, or their targets are refused."""

import pytest
import torch
from transformers import LlamaForCausalLM

from rdpo.config import Lora
from rdpo.errors import InputError
from rdpo.modeling.adapters import check_reached
from rdpo.modeling.model import ForwardSettings, Tuning, as_policy
from rdpo.modeling.student import _check_adapter
from tests.support.architectures import causal_types, small_model
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


LINEAR = "linear layers that can be named are k_proj, o_proj, q_proj, v_proj"
REFUSED_OF_EXPERTS = {
    "a router that is no linear layer": ("mixtral", ["gate"], LINEAR),
    "experts that are no linear layers": ("mixtral", ["gate_up_proj"], LINEAR),
    "all experts": ("mixtral", ["experts"], LINEAR),
    "a router whose output is not one tensor": (
        "phimoe",
        ["router"],
        r"model\.layers\.0\.mlp\.router, .* cannot be adapted: the output is not one tensor; .*k_proj",
    ),
    "all linear layers, a router of such a kind among them": (
        "llama4_text",
        "all-linear",
        r"feed_forward\.router, .* cannot be adapted: the output is not one tensor; "
        "linear layers that can be named are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj$",
    ),
    "weights that are read beside their layer": (
        "jamba",
        "all-linear",
        "no gradient reaches model.layers.0.mamba.dt_proj.* named are down_proj, gate_proj, in_proj, out_proj, router",
    ),
}


def tried(model_type, targets):
    lora = Lora(rank=2, target_modules=targets)
    _check_adapter(as_policy(small_model(model_type).to("meta"), SETTINGS, Tuning(lora)), lora)


@pytest.mark.parametrize("case", REFUSED_OF_EXPERTS)
def test_targets_among_experts_that_no_gradient_reaches_are_refused_with_those_that_can_be(case):
    model_type, targets, says = REFUSED_OF_EXPERTS[case]
    with pytest.raises(InputError, match=rf"training\.lora\.target_modules: .*{says}"):
        tried(model_type, targets)


@pytest.mark.parametrize(
    ("model_type", "targets"), [("mixtral", "all-linear"), ("mixtral", ["q_proj"]), ("jamba", ["router", "x_proj"])]
)
def test_targets_in_a_model_whose_forward_looks_at_numbers_are_taken(model_type, targets):
    tried(model_type, targets)


def test_an_expert_that_reads_the_text_speaks_for_those_that_do_not(tokenizer):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4))
            self.idle = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4))

        def forward(self, states):
            # The choice is a number, which a model without numbers does not have.
            return self.experts[int(states.sum().item() > 1e9)](states)

    def model():
        made = LlamaForCausalLM(tiny_config(tokenizer))
        made.model.layers[1].mlp = Experts()
        return made.to("meta")

    for targets in (["experts.0", "experts.1", "experts.2"], r".*\.experts\.\d"):
        lora = Lora(rank=2, target_modules=targets)
        _check_adapter(as_policy(model(), SETTINGS, Tuning(lora)), lora)
    lora = Lora(rank=2, target_modules=r".*\.idle\.\d")
    with pytest.raises(InputError, match=r"no gradient reaches model\.layers\.1\.mlp\.idle\.0, "):
        _check_adapter(as_policy(model(), SETTINGS, Tuning(lora)), lora)


def trains(model_type, lora):
    """Whether a small model with its adapter can be read and every adapter gets a gradient, or one of its layer's."""
    policy = as_policy(small_model(model_type), SETTINGS, Tuning(lora)).train()
    try:
        policy(policy.batch([[5, 6, 7, 8]], [[9, 10]], [[11]])).sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    trained = {
        name: weight.grad is not None for name, weight in policy.model.named_parameters() if weight.requires_grad
    }
    return "" if any(trained.values()) else "no gradient"


@pytest.mark.long
def test_all_linear_layers_of_every_architecture_are_trained_or_refused(capsys):
    """RDPO_ARCHITECTURES=mixtral,jamba names some of them."""
    wrong, lora = {}, Lora(rank=2, target_modules="all-linear")
    for model_type in causal_types():
        try:
            model = small_model(model_type)
        except ValueError:
            continue
        try:
            _check_adapter(as_policy(model.to("meta"), SETTINGS, Tuning(lora)), lora)
            found, fault = "taken", trains(model_type, lora)
        except InputError as error:
            found, fault = f"refused: {error}"[:150], ""
        if fault:
            wrong[model_type] = fault
        with capsys.disabled():
            print(f"{model_type:<28}{found} {fault[:100]}", flush=True)
    assert not wrong
