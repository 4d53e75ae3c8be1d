"""One engine for two models: each answer comes from the weights it asked for, as transformers gives it."""

import asyncio

import pytest

from rdpo.config import Engine as Settings
from rdpo.config import Sampling
from rdpo.synthesis.engine import Engine

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPTS = [[10, 20, 30, 40], [50, 60, 70]]
GREEDY = Sampling(temperature=0.0, max_tokens=8)


def greedy(folder, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        answers.append(whole_characters(tokenizer.decode(ids, skip_special_tokens=True)))
    return answers


def whole_characters(text):
    """Without the bytes at the end that are no character yet: vLLM holds them back, a tokenizer marks them."""
    return text.rstrip("\ufffd")


async def ask_all_at_once(engine, folders, stop_ids):
    async def ask(folder, prompt):
        async with engine.holding(folder):
            return whole_characters((await engine.generate(prompt, GREEDY, 0, stop_ids)).text)

    return await asyncio.gather(*[ask(folder, prompt) for folder in folders for prompt in PROMPTS])


def test_an_engine_answers_with_the_weights_that_are_asked_for(wordy_models, tokenizer):
    first, second = (greedy(folder, tokenizer) for folder in wordy_models)
    assert first != second
    folders = [*wordy_models, wordy_models[0]]

    async def main():
        settings = Settings(max_model_len=64, kv_cache_gib=1, dtype="float32")
        engine = Engine(wordy_models[0], settings, 0)
        try:
            return await ask_all_at_once(engine, folders, (tokenizer.eos_token_id,))
        finally:
            engine.shutdown()

    assert asyncio.run(main()) == [*first, *second, *first]


@pytest.mark.long
def test_an_engine_draws_as_it_is_told(wordy_models, tokenizer):
    """Greedy is what one likeliest token is, and what is as likely as the likeliest; a stop text ends an answer."""
    drawn = Sampling(temperature=1.0, max_tokens=40)
    asked = [
        drawn.model_copy(update={"top_k": 1, "max_tokens": 8}),
        drawn.model_copy(update={"min_p": 1.0, "max_tokens": 8}),
        Sampling(temperature=0.0, max_tokens=8, repetition_penalty=50.0),
    ]

    async def main():
        engine = Engine(wordy_models[0], Settings(max_model_len=64, kv_cache_gib=1, dtype="float32"), 0)

        async def say(sampling):
            return await engine.generate(PROMPTS[0], sampling, 3, (tokenizer.eos_token_id,))

        try:
            whole = (await say(drawn)).text
            stop = next(letter for letter in whole[1:] if letter.isascii() and letter.isprintable())
            stopped = await say(drawn.model_copy(update={"stop": [stop]}))
            return [await say(one) for one in asked], whole[: whole.index(stop)], stopped
        finally:
            engine.shutdown()

    (likeliest, least, new), beginning, stopped = asyncio.run(main())
    assert whole_characters(likeliest.text) == whole_characters(least.text) == greedy(wordy_models[0], tokenizer)[0]
    assert len(set(new.token_ids)) == len(new.token_ids)
    assert not set(new.token_ids) & set(PROMPTS[0])
    assert (stopped.text, stopped.finish_reason) == (beginning, "stop")


@pytest.mark.long
def test_a_teacher_wears_its_adapter(wordy_models, tokenizer, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(wordy_models[0], dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    bare, worn = greedy(wordy_models[0], tokenizer), greedy(tmp_path / "merged", tokenizer)
    assert bare != worn

    async def main():
        settings = Settings(max_model_len=64, kv_cache_gib=1, dtype="float32")
        engine = Engine(wordy_models[0], settings, 0, str(tmp_path / "adapter"))
        try:
            return await ask_all_at_once(engine, [wordy_models[0]], (tokenizer.eos_token_id,))
        finally:
            engine.shutdown()

    assert asyncio.run(main()) == worn


@pytest.mark.long
def test_drafts_from_the_conversation_change_no_greedy_answer(wordy_models, tokenizer, tmp_path):
    """Of a model that says hardly anything twice, and of one that says one thing over and over."""
    from transformers import AutoModelForCausalLM

    from tests.support.models import save_model

    same = AutoModelForCausalLM.from_pretrained(wordy_models[0])
    same.lm_head.weight.data.zero_()
    repeating = str(save_model(tmp_path / "repeating", same, tokenizer))
    sampling = Sampling(temperature=0.0, max_tokens=100)

    async def said(folder, **settings):
        from vllm.v1.metrics.reader import Counter, get_metrics_snapshot

        settings = Settings(max_model_len=256, kv_cache_gib=1, dtype="float32", **settings)
        engine = Engine(folder, settings, 0, disable_log_stats=False)
        try:
            asked = [engine.generate(prompt * 3, sampling, 0, (tokenizer.eos_token_id,)) for prompt in PROMPTS]
            ids = [answer.token_ids for answer in await asyncio.gather(*asked)]
            counts = {one.name: one.value for one in get_metrics_snapshot() if isinstance(one, Counter)}
        finally:
            engine.shutdown()
        return ids, counts.get("vllm:spec_decode_num_accepted_tokens", 0)

    plain, none = asyncio.run(said(wordy_models[0]))
    drafted, _ = asyncio.run(said(wordy_models[0], prompt_lookup=True))
    assert plain == drafted
    assert not none
    ids, accepted = asyncio.run(said(repeating, prompt_lookup=True))
    assert ids == [(0,) * 100] * len(PROMPTS)
    assert accepted > 100
