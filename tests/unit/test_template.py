"""Every chat template that TRL ships, held against what it writes of whole conversations: exact, or refused."""

import datetime
import re

import pytest

from rdpo.errors import InputError
from rdpo.modeling.chat import make_chat
from rdpo.modeling.template import Template, reads_date
from rdpo.preference.reference import tokenize_pair
from tests.support.models import CHATML, byte_tokenizer
from tests.support.templates import DAY, ENDS, FOLDER, NAMES, USER, pair_of, tokenizer_of

REFUSED = {
    "deepseek_r1_distill": "behind '<think>",
    "deepseekv3": "behind '<think>",
    "idefics3": "leaves out",
    "llava_next": "fails",
    "smolvlm": "leaves out",
}
"""Templates, and their variants for training, that no answer can be trained with, and the words that say why."""
DATED = {"gptoss", "llama3_2", "muse_glimmer"}
CONVERSATIONS = {
    "one turn": [USER],
    "a system message": [{"role": "system", "content": "Be brief."}, USER],
    "two turns": [
        {"role": "user", "content": "Hello there!"},
        {"role": "assistant", "content": "Hi."},
        USER,
    ],
    "a system message in between": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello there!"},
        {"role": "assistant", "content": "Hi."},
        {"role": "system", "content": "Now be long."},
        USER,
    ],
}


def base(name):
    return name.removesuffix("_training")


def chat_of(name):
    tokenizer = tokenizer_of(name)
    return make_chat(tokenizer, tokenizer.convert_tokens_to_ids(list(ENDS)), name, DAY)


def whole_of(tokenizer, messages, answer):
    """What the template writes of a whole conversation on that day, as token ids."""
    conversation = [*messages, {"role": "assistant", "content": answer}]
    rendered = tokenizer.apply_chat_template(
        conversation, tokenize=True, return_dict=True, strftime_now=lambda form: DAY.strftime(form)
    )
    return list(rendered["input_ids"])


@pytest.mark.parametrize("name", NAMES)
def test_a_template_is_exact_or_refused(name):
    if reason := REFUSED.get(base(name)):
        with pytest.raises(InputError, match=reason) as refused:
            chat_of(name)
        assert name in str(refused.value)
        assert "template" in str(refused.value)
        return

    chat, tokenizer = chat_of(name), tokenizer_of(name)
    kept = 0
    for messages in CONVERSATIONS.values():
        row = tokenize_pair(pair_of(messages, "An apple.", "carrot"), chat, 10_000)
        if row["dropped"]:
            assert len(messages) > 1
            assert "chat template refuses the pair" in row["dropped"]
            continue
        kept += 1
        for side, answer in (("chosen", "An apple."), ("rejected", "carrot")):
            ids, whole = row["prompt_ids"] + row[f"{side}_ids"], whole_of(tokenizer, messages, answer)
            assert whole[: len(ids)] == ids
            assert tokenizer.decode(row[f"{side}_ids"]).startswith(answer)
            assert all(message["content"] in tokenizer.decode(row["prompt_ids"]) for message in messages)
        assert tokenizer.decode(row["rejected_ids"]) == "carrot"
    assert kept


def test_what_is_refused_is_known():
    assert set(map(base, NAMES)) >= {*REFUSED, *DATED}


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("qwen3", "<think>\n\n</think>\n\n"),
        ("qwen3_6", "\n</think>\n\n"),
        ("gptoss", "<|channel|>final<|message|>"),
        ("glm4moe", "\n<think></think>\n"),
        ("nemotron_3_nano", "</think>"),
        ("llama3", ""),
    ],
)
def test_what_stands_between_asking_and_answering_belongs_to_the_prompt(name, opening):
    chat = chat_of(name)
    assert chat.opening == opening
    assert chat.tokenizer.decode(chat.prompt_ids([USER])).endswith(opening)


@pytest.mark.parametrize("name", NAMES)
def test_a_template_that_reads_the_date_has_one_date(name):
    dated = base(name) in DATED
    assert reads_date(tokenizer_of(name)) == dated
    if base(name) in REFUSED:
        return
    days = [DAY, datetime.date(2031, 12, 24)]
    one, other = (make_chat(tokenizer_of(name), [], name, day).prompt_ids([USER]) for day in days)
    assert (one != other) == dated


def test_a_date_in_a_comment_is_not_read():
    template = "{# strftime_now('%d') #}" + CHATML
    assert not reads_date(byte_tokenizer(template))


TRIMMING = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
QUIET = CHATML.replace("<|im_start|>{{ m", "{% if loop.first or m['role'] != 'system' %}<|im_start|>{{ m").replace(
    "<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "answer", "reason"),
    [
        (TRIMMING, [USER], "  indented", "strips the blanks around an answer"),
        (TRIMMING, [USER], "apple\n", "strips the blanks around an answer"),
        ((FOLDER / "qwen3.jinja").read_text(), [USER], "<think>hm</think>apple", "leaves out or changes"),
        (QUIET, CONVERSATIONS["a system message in between"], "apple", "leaves out or changes a message of the system"),
    ],
)
def test_a_row_that_the_template_writes_otherwise_is_dropped(template, messages, answer, reason):
    chat = make_chat(byte_tokenizer(template), [], "m")
    row = tokenize_pair(pair_of(messages, answer, "carrot"), chat, 10_000)
    assert reason in row["dropped"]


def test_blanks_of_an_answer_stay_where_the_template_keeps_them():
    chat = make_chat(byte_tokenizer(), [], "m")
    row = tokenize_pair(pair_of([USER], "    return 1\n", "carrot"), chat, 10_000)
    assert chat.tokenizer.decode(row["chosen_ids"]) == "    return 1\n<|im_end|>"


def test_a_blank_before_the_answer_belongs_to_the_answer():
    template = CHATML.replace(
        "\n{{ m['content'] }}", ":{{ ' ' if m['role'] == 'assistant' else '' }}{{ m['content'] }}"
    )
    chat = make_chat(byte_tokenizer(template.replace("assistant\n", "assistant:")), [], "m")
    row = tokenize_pair(pair_of([USER], "apple", "carrot"), chat, 10_000)
    assert chat.tokenizer.decode(row["prompt_ids"]).endswith("assistant:")
    assert chat.tokenizer.decode(row["chosen_ids"]) == " apple<|im_end|>"


def test_the_end_of_an_answer_is_what_the_template_writes():
    template = CHATML.replace("<|im_end|>", "<|END_RESPONSE|><|im_end|>")
    chat = make_chat(byte_tokenizer(template), [], "m")
    assert chat.tokenizer.decode(chat.completion_ids("apple", True)) == "apple<|END_RESPONSE|><|im_end|>"
    assert chat.tokenizer.decode(chat.completion_ids("apple", False)) == "apple"


def test_no_end_is_invented_where_the_template_writes_none():
    endless = re.sub(re.escape("<|im_end|>"), "", CHATML)
    chat = make_chat(byte_tokenizer(endless), [], "m")
    assert chat.ending == ()
    assert chat.tokenizer.decode(chat.completion_ids("apple", True)) == "apple"


def test_a_system_message_may_be_written_elsewhere_and_no_other():
    late = (
        "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>"
        "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
        "{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    template = Template(byte_tokenizer(late))
    with pytest.raises(ValueError, match="message of the system"):
        template.opening(CONVERSATIONS["a system message in between"])
