"""vLLM's engine on a GPU: it answers as transformers does, with other weights and with an adapter too."""

import asyncio

import pytest

from rdpo.config import Engine as Settings
from rdpo.config import Sampling
from rdpo.synthesis.engine import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

PROMPTS = [[10, 20, 30, 40], [50, 60, 70]]
GREEDY = Sampling(temperature=0.0, max_tokens=4)
SMALL = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30, "enforce_eager": True}


@pytest.fixture(scope="module")
def gpu_models(tmp_path_factory, tokenizer):
    """Two random Llamas whose heads have a size that GPU kernels take."""
    import torch
    from transformers import LlamaForCausalLM

    from tests.support.models import save_model, tiny_config

    folders = []
    for seed in (2, 3):
        torch.manual_seed(seed)
        shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = tiny_config(tokenizer, tie_word_embeddings=False, initializer_range=0.2, **shape)
        folders.append(save_model(tmp_path_factory.mktemp(f"wordy{seed}"), LlamaForCausalLM(config), tokenizer))
    return folders


def greedy(folder, tokenizer, adapter=None):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    answers = []
    for prompt in PROMPTS:
        ids = model.generate(
            input_ids=torch.tensor([prompt], device="cuda"), max_new_tokens=GREEDY.max_tokens, do_sample=False
        )
        answers.append(whole_characters(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)))
    return answers


def whole_characters(text):
    return text.rstrip("\ufffd")


async def ask(engine, folder, stop_ids):
    async with engine.holding(folder):
        answers = await asyncio.gather(*[engine.generate(prompt, GREEDY, 0, stop_ids) for prompt in PROMPTS])
    return [whole_characters(answer.text) for answer in answers]


def answers_of(folders, tokenizer, adapter=None):
    async def main():
        engine = Engine(folders[0], Settings(gpus=1, max_model_len=64, options=SMALL), 0, adapter)
        try:
            return [await ask(engine, folder, (tokenizer.eos_token_id,)) for folder in folders]
        finally:
            engine.shutdown()

    return asyncio.run(main())


def test_an_engine_answers_with_the_weights_that_are_asked_for(gpu_models, tokenizer):
    expected = [greedy(folder, tokenizer) for folder in gpu_models]
    assert expected[0] != expected[1]
    assert answers_of(gpu_models, tokenizer) == expected


def test_a_teacher_wears_its_adapter(gpu_models, tokenizer, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gpu_models[0], dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(5)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(tmp_path)
    expected = greedy(gpu_models[0], tokenizer, str(tmp_path))
    assert expected != greedy(gpu_models[0], tokenizer)
    assert answers_of(gpu_models[:1], tokenizer, str(tmp_path)) == [expected]
