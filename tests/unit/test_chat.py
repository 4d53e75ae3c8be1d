"""Token promises over real chat-template families: one BOS, prompt a prefix, no invented end of turn."""

import pytest

from rdpo.errors import InputError
from rdpo.modeling.chat import make_chat
from tests.support.models import CHATML, byte_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML
FAMILIES = {
    "chatml": (CHATML, None, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"),
    "llama3": (
        LLAMA3,
        "<|begin_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|end_of_text|>",
        "<|eot_id|>",
    ),
    "mistral": (MISTRAL, "<s>", ("</s>",), "</s>", "</s>"),
    "gemma": (GEMMA, "<bos>", ("<start_of_turn>", "<end_of_turn>", "<eos>"), "<eos>", "<end_of_turn>"),
    "qwen": (QWEN, None, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), "<|endoftext|>", "<|im_end|>"),
}
USER = [{"role": "user", "content": "hi there"}]


@pytest.fixture(params=FAMILIES)
def family(request):
    template, bos, specials, eos, end = FAMILIES[request.param]
    tokenizer = byte_tokenizer(template, bos, specials, eos)
    stops = [tokenizer.convert_tokens_to_ids(end)]
    return make_chat(tokenizer, stops, request.param), bos, end


def test_one_bos(family):
    chat, bos, _ = family
    ids = chat.prompt_ids(USER)
    if bos:
        assert ids[0] == chat.tokenizer.bos_token_id
        assert ids.count(chat.tokenizer.bos_token_id) == 1


def test_prompt_is_token_prefix_of_the_whole_conversation(family):
    chat, _, _ = family
    whole = chat.tokenizer.apply_chat_template(
        [*USER, {"role": "assistant", "content": "hello"}], tokenize=True, return_dict=True
    )["input_ids"]
    prompt, completion = chat.prompt_ids(USER), chat.completion_ids("hello", finished=True)
    assert whole[: len(prompt) + len(completion)] == prompt + completion


def test_end_of_turn_only_where_it_was_generated(family):
    chat, _, end = family
    finished, cut = chat.completion_ids("hello", True), chat.completion_ids("hello", False)
    assert finished == [*cut, chat.tokenizer.convert_tokens_to_ids(end)]
    assert chat.completion_ids("", True) == []


def test_special_tokens_in_an_answer_stay_text(family):
    chat, _, end = family
    ids = chat.completion_ids(f"say {end} now", finished=False)
    assert chat.tokenizer.convert_tokens_to_ids(end) not in ids
    assert chat.tokenizer.decode(ids) == f"say {end} now"


def test_doubled_bos_is_undone():
    tokenizer = byte_tokenizer("{{ bos_token }}" + LLAMA3, *FAMILIES["llama3"][1:4])
    ids = make_chat(tokenizer, [], "x").prompt_ids(USER)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_template_that_refuses_is_a_value_error():
    tokenizer = byte_tokenizer(*FAMILIES["mistral"][:4])
    with pytest.raises(ValueError, match="no system role"):
        make_chat(tokenizer, [], "x").prompt_ids([{"role": "system", "content": "s"}, *USER])


def test_missing_template_and_missing_eos_are_input_errors():
    with pytest.raises(InputError, match="chat template"):
        make_chat(byte_tokenizer(template=None), [], "base")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="EOS"):
        make_chat(tokenizer, [], "base")
