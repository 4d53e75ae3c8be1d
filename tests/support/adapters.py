"""LoRA adapters on tiny models, made by peft alone, as another tool leaves them."""

import json
from pathlib import Path


def adapter_on(base, folder, targets=("q_proj", "v_proj", "up_proj"), rank=4, **settings):
    """Folder of an adapter on the model of a folder, its update not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **settings)
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1 if "lora" in name else 0.3)
    adapted.save_pretrained(folder)
    return str(folder)


def edited(adapter, **changes):
    """An adapter whose configuration says something else."""
    file = Path(adapter) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")
    return adapter
