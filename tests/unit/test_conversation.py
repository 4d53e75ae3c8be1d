"""One conversation out of all given forms: nothing of it is lost, or the row is dropped with the reason."""

import json

import pytest

from rdpo.synthesis.conversation import Unusable, derive_pair, is_prompt, read_prompt


def says(role, content, **more):
    return {"role": role, "content": content, **more}


SYSTEM, QUESTION = says("system", "In capitals."), says("user", "Name a fruit.")
FIRST, AGAIN = says("assistant", "apple"), says("user", "Spell it backwards.")
GOOD, BAD = says("assistant", "elppa"), says("assistant", "carrot")
CALL = [{"type": "function", "function": {"name": "look_up", "arguments": {}}}]


def pair_of(chosen, rejected, **more):
    return derive_pair({"chosen": chosen, "rejected": rejected, **more}, "prompt")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Name a fruit.", "chosen": "elppa", "rejected": "carrot"}, [QUESTION]),
        ({"prompt": [SYSTEM, QUESTION], "chosen": "elppa", "rejected": [BAD]}, [SYSTEM, QUESTION]),
        ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, [QUESTION]),
        ({"prompt": "Name a fruit.", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, [QUESTION]),
        # The text is one turn of what the sides have in common.
        (
            {"prompt": "Name a fruit.", "chosen": [SYSTEM, QUESTION, GOOD], "rejected": [SYSTEM, QUESTION, BAD]},
            [SYSTEM, QUESTION],
        ),
        (
            {
                "prompt": "Spell it backwards.",
                "chosen": [QUESTION, FIRST, AGAIN, GOOD],
                "rejected": [QUESTION, FIRST, AGAIN, BAD],
            },
            [QUESTION, FIRST, AGAIN],
        ),
        # The prompt begins the conversation, and the sides have more in common.
        (
            {
                "prompt": [QUESTION],
                "chosen": [QUESTION, FIRST, AGAIN, GOOD],
                "rejected": [QUESTION, FIRST, AGAIN, BAD],
            },
            [QUESTION, FIRST, AGAIN],
        ),
        ({"prompt": [QUESTION], "chosen": [FIRST, AGAIN, GOOD], "rejected": [FIRST, AGAIN, BAD]}, None),
        # A side of messages and one of text: both answer the same conversation.
        ({"prompt": "Name a fruit.", "chosen": [SYSTEM, QUESTION, GOOD], "rejected": "carrot"}, [SYSTEM, QUESTION]),
        ({"chosen": [QUESTION, GOOD], "rejected": "carrot"}, [QUESTION]),
    ],
)
def test_the_prompt_is_all_that_both_sides_have_in_common(row, prompt):
    pair = derive_pair(row, "prompt")
    assert pair.prompt == (prompt or [QUESTION, FIRST, AGAIN])
    assert pair.answers == {"chosen": "elppa", "rejected": "carrot"}


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_messages_that_became_text_are_messages_again(write):
    pair = pair_of(write([QUESTION, GOOD]), write([QUESTION, BAD]), prompt="Name a fruit.")
    assert (pair.prompt, pair.answers["chosen"]) == ([QUESTION], "elppa")


def test_an_answer_that_is_a_list_in_json_stays_text():
    answer = '[{"name": "apple"}]'
    assert pair_of(answer, "carrot", prompt="As JSON.").answers["chosen"] == answer


def test_text_in_parts_is_joined():
    parts = [{"type": "text", "text": "el"}, {"type": "text", "text": "ppa"}]
    pair = pair_of([says("assistant", parts)], "carrot", prompt=[says("user", parts[:1])])
    assert (pair.prompt, pair.answers["chosen"]) == ([says("user", "el")], "elppa")


def test_blanks_belong_to_an_answer():
    assert pair_of("    return 1\n", "\treturn 2", prompt="q").answers == {
        "chosen": "    return 1\n",
        "rejected": "\treturn 2",
    }


def test_an_empty_system_message_is_kept_and_keys_that_are_null_are_none():
    empty = says("system", "")
    question = {**QUESTION, "tool_calls": None, "name": None}
    assert pair_of("a", "b", prompt=[empty, question]).prompt == [empty, QUESTION]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "a", "rejected": "b"}, "prompt: missing, and chosen has only the answer"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected: neither text nor a list of messages"),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, "chosen: empty"),
        (
            {"prompt": "Name a tool.", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
            "chosen: does not hold what stands in prompt",
        ),
        (
            {"chosen": [QUESTION, FIRST, AGAIN, GOOD], "rejected": [QUESTION, BAD]},
            "chosen: 3 messages follow what chosen and rejected have in common",
        ),
        ({"chosen": [QUESTION, GOOD], "rejected": [AGAIN, BAD]}, "chosen: 2 messages follow"),
        (
            {"prompt": "q", "chosen": "a", "rejected": [says("user", "b")]},
            "rejected: its last message is not the assistant's",
        ),
        (
            {"prompt": [QUESTION, says("assistant", "", tool_calls=[{"name": 3}])], "chosen": "a", "rejected": "b"},
            "prompt: a message of the assistant has tool_calls that cannot be read: a call without the name of a",
        ),
        (
            {"prompt": [says("user", "q", tool_calls=CALL)], "chosen": "a", "rejected": "b"},
            "prompt: a message of the user has `tool_calls`, which would be lost",
        ),
        (
            {"prompt": [says("user", "q", weight=0)], "chosen": "a", "rejected": "b"},
            "prompt: a message of the user has `weight`, which would be lost",
        ),
        (
            {"prompt": "q", "chosen": [says("assistant", "a", reasoning_content="hm")], "rejected": "b"},
            "chosen: a message of the assistant has `reasoning_content`, which would be lost",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": [{"x": 1}]}, "tools: no list of JSON schemas with"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": "["}, "tools: Expecting value"),
        (
            {"prompt": [says("user", [{"type": "image_url", "image_url": {}}])], "chosen": "a", "rejected": "b"},
            "prompt: a message of the user has a part of type image_url; only text can be used",
        ),
        ({"prompt": [says("user", "")], "chosen": "a", "rejected": "b"}, "prompt: a message of the user is empty"),
        ({"prompt": [QUESTION, FIRST], "chosen": "a", "rejected": "b"}, "prompt: ends with an assistant message"),
        (
            {"prompt": "q", "chosen": "[{'role': 'assistant', 'content': 'a'", "rejected": "b"},
            None,
        ),
        (
            {"prompt": "q", "chosen": "[{'role': 'assistant', 'content': a}]", "rejected": "b"},
            "chosen: text that looks like messages and cannot be read",
        ),
    ],
)
def test_what_would_be_lost_is_the_reason(row, reason):
    if reason is None:
        assert derive_pair(row, "prompt").answers["chosen"] == row["chosen"]
        return
    with pytest.raises(Unusable) as error:
        derive_pair(row, "prompt")
    assert str(error.value).startswith(reason)


def test_prompts_alone():
    assert read_prompt("q") == [says("user", "q")]
    assert read_prompt(repr([SYSTEM, QUESTION])) == [SYSTEM, QUESTION]
    assert is_prompt("q") and not is_prompt([FIRST]) and not is_prompt(7)
