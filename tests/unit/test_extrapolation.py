"""ExPO: whole weights and adapters are moved by the same amount."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.stages import policy, training
from rdpo.training.checkpoint import finish_policy
from rdpo.training.extrapolation import extrapolate
from tests.support.models import save_model, tiny_config


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def trained_adapter(model, folder):
    """An adapter whose update is not zero."""
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)


@pytest.mark.parametrize("alpha", [0.5, -0.5])
def test_adapter_and_whole_weights_move_equally_far(tiny_model, tmp_path, alpha):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    trained_adapter(tiny_model, tmp_path / "adapter")
    finish_policy(tmp_path / "adapter", base, tmp_path / "merged")
    before, after = weights(base), weights(tmp_path / "merged")
    shutil.copytree(tmp_path / "merged", tmp_path / "whole")
    extrapolate(tmp_path / "whole", base, alpha)
    extrapolate(tmp_path / "adapter", base, alpha)
    finish_policy(tmp_path / "adapter", base, tmp_path / "further")
    whole, further = weights(tmp_path / "whole"), weights(tmp_path / "further")
    moved = 0
    for name, start in before.items():
        expected = start + (1 + alpha) * (after[name] - start)
        torch.testing.assert_close(whole[name], expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(further[name], expected, atol=1e-5, rtol=0)
        moved += not torch.equal(after[name], start)
    assert moved > 5


def test_an_extrapolated_arm_shares_its_training(job_table):
    plain = Job.model_validate(job_table)
    further = Job.model_validate({**job_table, "training": {**job_table["training"], "extrapolation": 0.5}})
    assert training.settings(plain) == training.settings(further)
    assert policy.settings(plain) != policy.settings(further)


PARTS = {
    "lora_embedding_B": (["embed_tokens", "q_proj"], {}),
    "norm": (["q_proj"], {"modules_to_save": ["norm"]}),
    "bias": (["q_proj"], {"lora_bias": True}),
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_an_adapter_moves(part, tmp_path, tokenizer):
    targets, settings = PARTS[part]
    config = tiny_config(tokenizer, tie_word_embeddings=False, attention_bias=True)
    base = tmp_path / "base"
    save_model(base, LlamaForCausalLM(config), tokenizer)
    any_adapter(base, tmp_path / "adapter", targets, **settings)
    finish_policy(tmp_path / "adapter", base, tmp_path / "merged")
    before, after = weights(base), weights(tmp_path / "merged")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert part in {piece for name in stored for piece in name.split(".")}
    extrapolate(tmp_path / "adapter", base, 0.5)
    finish_policy(tmp_path / "adapter", base, tmp_path / "further")
    for name, tensor in weights(tmp_path / "further").items():
        torch.testing.assert_close(tensor, before[name] + 1.5 * (after[name] - before[name]), atol=1e-5, rtol=0)


def any_adapter(base, folder, targets, **settings):
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **settings))
    for weight in adapted.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(folder)


def test_what_cannot_be_moved_exactly_is_refused_and_left(tiny_model, tmp_path):
    any_adapter(tiny_model, tmp_path / "adapter", ["q_proj"], use_dora=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"training.extrapolation: .*lora_magnitude_vector.* cannot be moved exactly"):
        extrapolate(tmp_path / "adapter", Path(tiny_model), 0.5)
    assert file.read_bytes() == before


def test_files_that_name_tensors_otherwise_are_moved_by_the_architectures_names(tmp_path, tokenizer):
    base = tmp_path / "base"
    save_model(base, GPT2LMHeadModel(GPT2Config(vocab_size=280, n_embd=16, n_layer=1, n_head=2)), tokenizer)
    shutil.copytree(base, tmp_path / "whole")
    stored = load_file(base / "model.safetensors")
    # As the first checkpoints of GPT-2 have them.
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    moved = {name: tensor + 1 for name, tensor in stored.items()}
    save_file(moved, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    extrapolate(tmp_path / "whole", base, 0.5)
    before, after = weights(base), weights(tmp_path / "whole")
    for name, start in before.items():
        torch.testing.assert_close(after[name], start + 1.5)
