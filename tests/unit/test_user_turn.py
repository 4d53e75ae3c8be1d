"""Where templates let a user begin and end: every template that TRL ships, exact or refused."""

import pytest

from rdpo.modeling.template import Template, Unfit, template_ids
from rdpo.modeling.user_turn import added_tokens, user_turn
from tests.support.models import CHATML, byte_tokenizer
from tests.support.templates import DAY, NAMES, USER, tokenizer_of

SYSTEM = {"role": "system", "content": "You are a cook.\nBe brief."}
MARKS = ("<|im_start|>", "<|start|>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]")
REFUSED = {"idefics3", "llava_next", "smolvlm"}
"""Templates, and their variants for training, that take no plain text."""
NO_SYSTEM = {"gemma"}
"""Those that take no system message."""
ENDS = {
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "gptoss": "<|end|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseekv3": "<｜Assistant｜>",
}
"""What ends a user's message in some of them."""


def base(name):
    return name.removesuffix("_training")


def turn_of(name, system=None):
    return user_turn(Template(tokenizer_of(name, MARKS), DAY), system)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("system", [None, SYSTEM["content"]])
def test_a_user_begins_where_the_template_has_it_or_the_template_is_refused(name, system):
    tokenizer = tokenizer_of(name, MARKS)
    messages = [*([SYSTEM] if system else []), USER]
    if base(name) in REFUSED or (system and base(name) in NO_SYSTEM):
        with pytest.raises(ValueError):
            turn_of(name, system)
        return

    turn = turn_of(name, system)
    arguments = {"strftime_now": DAY.strftime, "add_generation_prompt": True}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    ids = template_ids(tokenizer, text)
    assert tuple(ids[: len(turn.ids)]) == turn.ids
    said = tokenizer.decode(ids[len(turn.ids) :])
    assert said.lstrip(" ").startswith(USER["content"])
    behind = said.lstrip(" ").removeprefix(USER["content"])
    assert behind.startswith(turn.end)
    if turn.end_id is None:
        assert turn.end.strip()
    else:
        assert behind.removeprefix(turn.end).lstrip().startswith(tokenizer.decode([turn.end_id]))
    assert (system or "").strip() in turn.before


@pytest.mark.parametrize(("name", "end"), ENDS.items())
def test_a_users_message_ends_with_what_the_template_writes(name, end):
    turn = turn_of(name)
    tokens = added_tokens(tokenizer_of(name, MARKS))
    assert (turn.end or tokens[turn.end_id]) == end


INST = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set before = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set before = '' %}{% endif %}{% for m in rest %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (before if loop.first else '') }}"
    "{{ m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'].strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
NAMED = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }} {% elif m['role'] == 'user' %}"
    "USER: {{ m['content'] }} {% else %}ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ENDED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "before", "behind_system", "end"),
    [
        (INST, "<s>[INST]", "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n", " [/INST]"),
        (NAMED, "USER:", "Be brief. USER:", " ASSISTANT:"),
        (ENDED, "<|user|>\n", "<|system|>\nBe brief.</s>\n<|user|>\n", ""),
    ],
)
def test_forms_in_which_models_were_trained(template, before, behind_system, end):
    tokenizer = byte_tokenizer(template, "<s>", ("</s>",), "</s>")
    bare, with_system = user_turn(Template(tokenizer)), user_turn(Template(tokenizer), "Be brief.")
    assert (bare.before, with_system.before) == (before, behind_system)
    assert bare.end == with_system.end == end
    # Where the template ends a message with words alone there is no token to end it.
    assert (bare.end_id is None) == bool(end)


def around(template, **more):
    return user_turn(Template(byte_tokenizer(template, **more)))


def test_a_user_of_chatml():
    turn = around(CHATML)
    assert (turn.before, turn.end, turn.end_id) == ("<|im_start|>user\n", "", 1)


def test_a_blank_before_the_message_is_the_models_to_write():
    turn = around(CHATML.replace("\n{{ m['content'] }}", ": {{ m['content'] }}"))
    assert turn.before == "<|im_start|>user:"


def test_plain_words_may_end_a_message():
    plain = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    turn = around(plain + "{% if add_generation_prompt %}### assistant:\n{% endif %}")
    assert (turn.before, turn.end, turn.end_id) == ("### user:\n", "\n\n### assistant:", None)


def test_words_and_a_token_may_end_a_message():
    words = CHATML.replace("<|im_end|>\n{% endfor %}", "/quick\n<|im_end|>\n{% endfor %}")
    turn = around(words)
    assert (turn.end, turn.end_id) == ("/quick", 1)


BARE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (BARE, "nothing before a user's message"),
        ("<|im_start|>" + BARE.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"), "leaves out or changes"),
        ("<|im_start|>" + BARE.replace("{{ m['content'] }}", "{{ m['content'] | tojson }}"), "leaves out or changes"),
        (
            "<|im_start|>{{ messages[0]['content'] | length }}" + BARE,
            "depends on the message",
        ),
        ("{% if add_generation_prompt %}<|im_start|>{% endif %}A user:" + BARE, "depends on whether that is answered"),
        ("<|im_start|>{{ messages[0]['content'] }}" + BARE, "more than once"),
        ("<|im_start|>" + BARE.replace("{{ eos_token }}", "\n"), "nothing behind a user's message"),
    ],
)
def test_a_template_without_a_place_for_a_user_is_refused(template, reason):
    with pytest.raises(ValueError, match=reason):
        around(template)


def test_a_bos_alone_is_no_beginning():
    with pytest.raises(Unfit, match="nothing before"):
        around("{{ bos_token }}" + BARE, bos="<s>")


def test_a_system_message_that_stands_behind_or_nowhere_is_refused():
    late = BARE.replace("{{ m['content'] }}", "{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}{% endif %}")
    template = Template(byte_tokenizer(late))
    assert user_turn(template).before == "<|im_start|>"
    with pytest.raises(ValueError, match="leaves out or changes a message of the system"):
        user_turn(template, "Be brief.")
    behind = late.replace("{{ eos_token }}", "{% if loop.last %}{{ messages[0]['content'] }}{% endif %}{{ eos_token }}")
    with pytest.raises(ValueError, match="does not write the system message before"):
        user_turn(Template(byte_tokenizer(behind)), "Be brief.")
