"""The published folder of each form reloads as what was trained."""

import pytest

from rdpo.config import Job
from rdpo.evaluation.publish import publish
from rdpo.modeling.weights import local_model
from rdpo.training.checkpoint import EXPORT, MERGED, finish_policy
from tests.support.model_card import FACTS


@pytest.fixture
def trained(tiny_model, tmp_path):
    """A training folder with an adapter whose update is not zero, and the model it is merged into."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / EXPORT)
    finish_policy(tmp_path / EXPORT, local_model(tiny_model), tmp_path / MERGED)
    return tmp_path


@pytest.mark.parametrize("merge", [True, False])
def test_a_model_and_a_bare_adapter_are_published_and_verified(job_table, trained, tmp_path, merge):
    job = Job.model_validate(job_table | {"publish": {"merge": merge}})
    target = tmp_path / "published"
    checks = publish(job, trained / EXPORT, trained / MERGED, target, FACTS)
    assert checks["logit_difference"] < 1e-3
    assert (target / "README.md").is_file()
    assert (target / "config.json").is_file() == merge
    assert (target / "adapter" / "adapter_config.json").is_file() == merge
    assert (target / "adapter_model.safetensors").is_file() != merge
    modes = {file.stat().st_mode for file in target.rglob("*") if file.is_file()}
    assert modes == {(target / "README.md").stat().st_mode}
