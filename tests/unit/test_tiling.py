"""Rows longer than a card's memory: MLPs in tiles, and layers' inputs on the CPU; the same values and gradients."""

from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rdpo.config import Job, Lora
from rdpo.errors import InputError
from rdpo.modeling.miniature import check_miniature
from rdpo.modeling.model import ForwardSettings, Tuning, as_policy
from rdpo.modeling.student import check_architecture
from rdpo.modeling.tiling import tile_mlps
from rdpo.planning.memory import offloaded_memory, rehearse
from rdpo.planning.plan import plan
from tests.support.jobs import valid_job
from tests.support.tensors import LargestTensor

SHAPES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SETTINGS = ForwardSettings("float32", 64)


def policy_of(kind, layout="auto", **tuning):
    torch.manual_seed(0)
    shapes = SHAPES | (EXPERTS if kind == "mixtral" else {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shapes))
    return as_policy(model, ForwardSettings("float32", 64, layout), Tuning(**tuning)).train()


def drawn():
    """Nine texts, always the same."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 20, (9,), generator=draw).tolist()
    return [torch.randint(3, 96, (length,), generator=draw).tolist() for length in lengths]


def batch_for(policy):
    """Three prompts with two answers each."""
    texts = drawn()
    return policy.batch(texts[:3], texts[3:6], texts[6:])


def step(policy):
    """Log-probs, and the gradients of all that is trained."""
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.manual_seed(2)
            nn.init.normal_(weight, std=0.1)
    logps = policy(batch_for(policy))
    logps.square().sum().backward()
    return [logps.detach(), *(weight.grad for weight in policy.parameters() if weight.grad is not None)]


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"lora": Lora(rank=4)}])
@pytest.mark.parametrize(
    ("kind", "layout"), [("llama", "packed"), ("llama", "padded"), ("gemma2", "packed"), ("mixtral", "auto")]
)
@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_tiles_change_no_value_and_no_gradient(kind, layout, more, tokens):
    same(step(policy_of(kind, layout, mlp_tile=tokens, **more)), step(policy_of(kind, layout, **more)))


def test_an_adapter_drops_the_same_numbers_when_a_tile_is_read_again():
    """Otherwise the gradient would not be that of the values."""
    policy = policy_of("llama", lora=Lora(rank=4, dropout=0.5), mlp_tile=4)
    hidden = torch.randn(1, 12, 32, requires_grad=True)
    mlp = policy.layers()[0].mlp
    step(policy)
    torch.manual_seed(3)
    output = mlp(hidden)
    (gradient,) = torch.autograd.grad(output.sum(), hidden)
    # Along a line the values change as the gradient says, under the same draws.
    torch.manual_seed(3)
    nudged = mlp(hidden + 1e-3 * gradient)
    torch.testing.assert_close((nudged - output).sum(), 1e-3 * gradient.square().sum(), rtol=0.05, atol=0)


def test_no_wide_state_of_a_whole_row_is_ever_held():
    policy = policy_of("llama", mlp_tile=8)
    batch = batch_for(policy)
    wide = batch.input_ids.numel() * SHAPES["intermediate_size"]
    largest = LargestTensor()
    with largest:
        policy(batch).sum().backward()
    assert largest.elements <= max(weight.numel() for weight in policy.parameters()) < wide / 3


def test_what_layers_keep_can_lie_elsewhere():
    """The input of each layer goes there, and the numbers are the same."""
    plain = step(policy_of("llama", gradient_checkpointing=True))
    policy, there = policy_of("llama", gradient_checkpointing=True), []
    policy.stash = partial(torch.autograd.graph.saved_tensors_hooks, lambda one: put(one, there), lambda one: one)
    same(step(policy), plain)
    tokens = sum(map(len, drawn()))
    assert there.count((1, tokens, SHAPES["hidden_size"])) >= SHAPES["num_hidden_layers"]
    # No weight of a layer is among them, nor what a layer makes between its input and its output.
    assert max(torch.Size(shape).numel() for shape in there) == tokens * SHAPES["hidden_size"]


def put(tensor, there):
    there.append(tuple(tensor.shape))
    return tensor


def test_a_plan_shows_what_both_take_away(tiny_model, tmp_path):
    table = valid_job(tiny_model, tmp_path)
    table["training"] |= {"gradient_checkpointing": True, "gpus_per_worker": 1, "zero_stage": 1}
    table["training"] |= {"tokens_per_batch": 4096, "batch_size": 64, "logprob_chunk": 16}
    table["reference"] = {"max_length": 900}

    def planned(**more):
        return Job.model_validate(table | {"training": table["training"] | more})

    whole = rehearse(planned())
    tiled = rehearse(planned(mlp_tile=64))
    offloaded = planned(mlp_tile=64, offload_activations=True)
    elsewhere = rehearse(offloaded)
    assert tiled.activations < whole.activations
    assert elsewhere.activations < tiled.activations
    assert offloaded_memory(offloaded, elsewhere) == {"activations": elsewhere.stashed}
    assert "activations 0.0" in "\n".join(plan(offloaded, None, None))


class Two(nn.Module):
    """An MLP that gives two things."""

    def forward(self, hidden):
        return hidden, hidden


def layer_with(mlp):
    layer = nn.Module()
    layer.mlp = mlp
    return layer


def test_what_cannot_be_read_in_tiles_is_refused():
    with pytest.raises(InputError, match=r"training\.mlp_tile: Linear has no MLP of its own"):
        tile_mlps([nn.Linear(2, 2)], 4)

    layer = layer_with(Two())
    tile_mlps([layer], 2)
    with pytest.raises(InputError, match=r"gives more than hidden states; remove it"):
        layer.mlp(torch.ones(1, 4, 2))

    layer = layer_with(nn.Bilinear(2, 2, 2))
    tile_mlps([layer], 2)
    with pytest.raises(InputError, match=r"reads more than hidden states; remove it"):
        layer.mlp(torch.ones(1, 4, 2), torch.ones(1, 4, 2))


def test_tiles_that_cannot_be_tried_are_refused(tiny_model, tmp_path, monkeypatch):
    table = valid_job(tiny_model, tmp_path)
    monkeypatch.setattr("rdpo.modeling.miniature._miniature", lambda *_: None)
    assert check_architecture(Job.model_validate(table)) is None
    table["training"]["mlp_tile"] = 64
    with pytest.raises(InputError, match=r"training\.mlp_tile: student\.model .* cannot be tried, since no small"):
        check_architecture(Job.model_validate(table))


def test_an_mlp_that_looks_at_neighbours_is_found_before_work(monkeypatch):
    from transformers.models.llama import modeling_llama

    config = AutoConfig.for_model("llama", **SHAPES)
    assert check_miniature("student.model x", config, SETTINGS, tiled=True)
    whole = modeling_llama.LlamaMLP.forward

    def beside(self, hidden):
        return whole(self, hidden + nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0)))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", beside)
    assert check_miniature("student.model x", config, SETTINGS)
    with pytest.raises(InputError, match=r"mlp_tile: student\.model x .*: tiles change the log-probs by .* nats"):
        check_miniature("student.model x", config, SETTINGS, tiled=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile_layers": True, "mlp_tile": 8, "zero_stage": 1}, "mlp_tile: compile_layers compiles a layer once"),
        ({"offload_activations": True}, "offload_activations: without gradient_checkpointing far more is kept"),
        ({"mlp_tile": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(job_table, settings, message):
    job_table["training"] |= settings
    with pytest.raises(ValidationError, match=message):
        Job.model_validate(job_table)
