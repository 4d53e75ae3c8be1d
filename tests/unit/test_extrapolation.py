"""ExPO: whole weights and adapters are moved by the same amount."""

import shutil

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rdpo.config import Job
from rdpo.stages import policy, training
from rdpo.training.checkpoint import finish_policy
from rdpo.training.extrapolation import extrapolate


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


def test_adapter_and_whole_weights_move_equally_far(tiny_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    trained_adapter(tiny_model, tmp_path / "adapter")
    finish_policy(tmp_path / "adapter", base, tmp_path / "merged")
    before, after = weights(base), weights(tmp_path / "merged")
    shutil.copytree(tmp_path / "merged", tmp_path / "whole")
    extrapolate(tmp_path / "whole", base, 0.5)
    extrapolate(tmp_path / "adapter", base, 0.5)
    finish_policy(tmp_path / "adapter", base, tmp_path / "further")
    whole, further = weights(tmp_path / "whole"), weights(tmp_path / "further")
    moved = 0
    for name, start in before.items():
        expected = start + 1.5 * (after[name] - start)
        torch.testing.assert_close(whole[name], expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(further[name], expected, atol=1e-5, rtol=0)
        moved += not torch.equal(after[name], start)
    assert moved > 5


def test_an_extrapolated_arm_shares_its_training(job_table):
    plain = Job.model_validate(job_table)
    further = Job.model_validate({**job_table, "training": {**job_table["training"], "extrapolation": 0.5}})
    assert training.settings(plain) == training.settings(further)
    assert policy.settings(plain) != policy.settings(further)
