"""Conversations with tools: from a data set's form to the tokens that are trained on, and back."""

import json

import pyarrow as pa
import pytest

from rdpo.config import Job, Pairs
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder
from rdpo.inspection.export import export
from rdpo.messages import calls_text, is_plain, server_form, template_form, tools_message, tools_of, with_tools
from rdpo.modeling.chat import make_chat
from rdpo.modeling.masking import counted_ids, read_ids
from rdpo.preference.pairs import pair_row, sound
from rdpo.preference.reference import tokenize_pair
from rdpo.records import prompt_id, question_id, table_of, text_of
from rdpo.synthesis.conversation import Unusable, derive_pair
from rdpo.synthesis.given import answered
from rdpo.synthesis.prompts import _prompt_table, prompt_row
from tests.support.made_up import made_up_run
from tests.support.templates import DAY, ENDS, tokenizer_of

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look up a word.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}


def call(**arguments):
    return {"type": "function", "function": {"name": "look_up", "arguments": arguments}}


ASKED = {"role": "user", "content": "What is a pomelo?"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [call(word="pomelo")]}
RESULT = {"role": "tool", "name": "look_up", "content": "a fruit"}
TELLS = {"role": "assistant", "content": "It is a fruit."}
GUESSES = {"role": "assistant", "content": "A kind of dog."}
CHOSEN = {"tools": [TOOL], "prompt": [ASKED], "chosen": [CALLS], "rejected": [GUESSES]}
SEVERAL = {**CHOSEN, "chosen": [CALLS, RESULT, TELLS]}
EARLIER = {**CHOSEN, "prompt": [ASKED, CALLS, RESULT], "chosen": [TELLS]}

EXACT = ["qwen2_5", "qwen3_instruct_2507", "qwen3_6", "llama3_1", "llama3_2", "nemotron_3_nano", "lfm2_v2"]
"""Templates that write tools, their calls and results so that an answer of several messages can be trained on."""
KNOWING = [*EXACT, "qwen3", "glm4moe", "gptoss", "muse_glimmer", "gemma4"]
"""Templates that write tools and their calls."""
UNKNOWING = ["llama3", "gemma", "gemma3", "phi3", "phi3_5", "cohere"]
"""Templates that know of none."""


def chat_of(name):
    tokenizer = tokenizer_of(name, ("<|call|>", "<|eom_id|>"))
    return make_chat(tokenizer, tokenizer.convert_tokens_to_ids([*ENDS, "<|call|>", "<|eom_id|>"]), name, DAY)


SIDES = Pairs(chosen="chosen", rejected="rejected")


def paired(raw, several=False, **more):
    """The pair of a raw row; or the reason why it is none."""
    pair = derive_pair(raw, "prompt", several=several)
    row = {"prompt_id": "p", "prompt": pair.prompt, **more}
    for side, text in pair.answers.items():
        row |= {side: text, f"{side}_score": 0.0, f"{side}_scores": {"r": 1.0}, f"{side}_finish_reason": "stop"}
        row |= {f"{side}_messages": json.dumps(pair.completions[side])} if side in pair.completions else {}
    return pair_row(row, SIDES)


def row_of(chat, raw, several=False):
    return tokenize_pair(paired(raw, several), chat, 4096)


def text_of_ids(chat, ids):
    return chat.tokenizer.decode(read_ids(ids))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_schema_and_call_are_in_the_ids_as_the_template_writes_them(name):
    chat = chat_of(name)
    row = row_of(chat, CHOSEN)
    assert row["dropped"] is None
    prompt, completion = text_of_ids(chat, row["prompt_ids"]), text_of_ids(chat, row["chosen_ids"])
    assert '"name": "look_up"' in prompt and '"required": ["word"]' in prompt
    assert '{"name": "look_up", "arguments": {"word": "pomelo"}}' in completion
    whole = chat.tokenizer.apply_chat_template([ASKED, CALLS], tools=[TOOL], tokenize=False)
    assert whole.startswith(prompt + completion)
    assert completion.endswith("<|im_end|>")
    assert counted_ids(row["chosen_ids"]) == row["chosen_ids"]


@pytest.mark.parametrize("name", KNOWING)
@pytest.mark.parametrize(("raw", "several"), [(CHOSEN, False), (EARLIER, False), (SEVERAL, True)])
def test_a_template_writes_tools_exactly_or_the_row_is_dropped(name, raw, several):
    chat = chat_of(name)
    row = row_of(chat, raw, several)
    if row["dropped"]:
        assert name not in EXACT and raw is not EARLIER
        assert row["dropped"].startswith("chat template refuses the pair: ")
        return
    messages = [*raw["prompt"], *raw["chosen"]]
    whole = chat.tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False, strftime_now=DAY.strftime)
    trained = row["prompt_ids"] + read_ids(row["chosen_ids"])
    assert chat.written_ids(whole)[: len(trained)] == trained


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507"])
def test_of_several_messages_those_of_the_assistant_count(name):
    chat = chat_of(name)
    row = row_of(chat, SEVERAL, several=True)
    counted = chat.tokenizer.decode(counted_ids(row["chosen_ids"]))
    read = chat.tokenizer.decode([token for token in read_ids(row["chosen_ids"]) if ~token in row["chosen_ids"]])
    assert counted.count("<|im_end|>") == 2
    assert '"arguments": {"word": "pomelo"}' in counted and counted.endswith("It is a fruit.<|im_end|>")
    assert "a fruit\n</tool_response>" not in counted
    assert "<tool_response>\na fruit\n</tool_response>" in text_of_ids(chat, row["chosen_ids"])
    assert read


def test_several_messages_are_refused_where_the_last_is_trained_on():
    with pytest.raises(Unusable, match=r"chosen: 3 messages follow .* while reference.train_on is `last`"):
        derive_pair(SEVERAL, "prompt")


@pytest.mark.parametrize("name", UNKNOWING)
@pytest.mark.parametrize("raw", [CHOSEN, EARLIER])
def test_a_template_without_tools_drops_the_row_with_the_reason(name, raw):
    row = row_of(chat_of(name), raw)
    # Some say so themselves.
    assert row["dropped"].startswith("chat template refuses the pair: ")
    assert "leaves out the tool look_up" in row["dropped"] or raw is EARLIER


def test_an_answer_with_a_special_token_in_its_arguments_is_dropped():
    chat = chat_of("qwen2_5")
    row = row_of(chat, {**CHOSEN, "chosen": [{**CALLS, "tool_calls": [call(word="a<|im_end|>b")]}]})
    assert "holds '<|im_end|>', which is a token of the template's own" in row["dropped"]


def test_a_result_that_the_template_leaves_out_drops_the_row():
    chat = chat_of("qwen2_5")
    chat.tokenizer.chat_template = chat.tokenizer.chat_template.replace("message.content", "'x'")
    assert row_of(chat, EARLIER)["dropped"]


@pytest.mark.parametrize("value", ["i", "im_end", "\n"])
def test_a_value_that_the_template_leaves_out_drops_the_row_although_its_letters_stand_elsewhere(value):
    chat = chat_of("qwen2_5")
    written = "tool_call.arguments | tojson"
    assert written in chat.tokenizer.chat_template
    names = """'{"' ~ (tool_call.arguments | list | join) ~ '": ""}'"""
    chat.tokenizer.chat_template = chat.tokenizer.chat_template.replace(written, names)
    row = row_of(chat, {**CHOSEN, "chosen": [{**CALLS, "tool_calls": [call(word=value)]}]})
    assert "leaves out or changes a message of the assistant" in row["dropped"]


def test_the_forms_of_calls_are_read_alike():
    openai = [{"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "pomelo"}'}}]
    arrow = [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "pomelo", "other": None}}}]
    plain = json.dumps([call(word="pomelo")])
    assert json.loads(calls_text(openai)) == [{"id": "1", **call(word="pomelo")}]
    assert calls_text(arrow) == calls_text(plain) == plain
    assert json.loads(calls_text([{"name": "f", "arguments": {}}])) == [{"name": "f", "arguments": {}}]
    for broken in (
        "[",
        3,
        [3],
        [{"function": {}}],
        [{"name": "f", "arguments": "["}],
        [{"name": "f", "arguments": [1]}],
    ):
        with pytest.raises(ValueError):
            calls_text(broken)


def test_tools_stand_behind_the_system_message_wherever_that_comes_from():
    system = {"role": "system", "content": "Be brief."}
    for messages in ([ASKED], [system, ASKED]):
        found = with_tools(messages, json.dumps([TOOL]))
        assert [message["role"] for message in found][-2:] == ["tools", "user"]
        assert tools_of(found) == [TOOL]
        assert template_form(found) == messages
    assert with_tools([ASKED], []) == [ASKED]
    assert with_tools([ASKED], [json.dumps(TOOL)]) == with_tools([ASKED], [TOOL])
    assert not is_plain(with_tools([ASKED], [TOOL]))


def test_servers_are_sent_arguments_as_json_and_the_row_stays_as_it_is():
    stored = {"role": "assistant", "content": "", "tool_calls": calls_text([call(word="x")]), "name": None}
    for _ in range(2):
        sent = server_form([ASKED, stored])
        assert sent[0] == ASKED
        assert sent[1]["tool_calls"][0]["function"] == {"name": "look_up", "arguments": '{"word": "x"}'}
        assert "name" not in sent[1]


def test_prompts_with_other_tools_or_calls_are_other_prompts():
    stored = {**CALLS, "tool_calls": calls_text(CALLS["tool_calls"])}
    other = {**CALLS, "tool_calls": calls_text([call(word="dog")])}
    for identity in (prompt_id, question_id):
        names = [
            identity(messages)
            for messages in ([ASKED], [tools_message([TOOL]), ASKED], [ASKED, stored, RESULT], [ASKED, other, RESULT])
        ]
        assert len(set(names)) == 4
        assert identity([{**ASKED, "tool_calls": None, "name": None}]) == names[0]
    assert "look_up" in text_of([ASKED, stored])


def test_rows_with_tools_lie_in_tables_beside_others(job_table):
    job_table["synthesis"] = {"reasoning": "off"}
    job = Job.model_validate(job_table)
    raws = [{**CHOSEN, "prompt": [ASKED]}, {"prompt": "plain?", "chosen": "yes", "rejected": "no"}]
    row = prompt_row("f", 1, raws[0], job)
    # The tiny model's template knows of no tools.
    assert "leaves out the tool look_up" in row["dropped"]
    raw = [{"source": "f", "line": n, "problem": None, "raw": json.dumps(one)} for n, one in enumerate(raws)]
    both, alone = (_prompt_table(pa.Table.from_pylist(rows), job) for rows in (raw, raw[1:]))
    joined = pa.concat_tables([both, alone], promote_options="permissive")
    assert joined.num_rows == 3
    assert joined.to_pylist()[2]["prompt"][0]["content"] == "plain?"


def test_rewards_that_read_text_alone_get_no_call():
    extra = {"chosen": "…", "rejected": "b", "chosen_messages": json.dumps([CALLS])}
    row = {"prompt_id": "p", "prompt": [ASKED], "extra": json.dumps(extra), "dropped": None}
    assert answered(row)["dropped"] is None
    assert json.loads(answered(row)["chosen_messages"]) == [CALLS]
    assert (
        "chosen calls tools or is of several messages, which the reward rm cannot"
        in answered(row, readers=["rm"])["dropped"]
    )
    plain = {**row, "extra": json.dumps({"chosen": "a", "rejected": "b"})}
    assert answered(plain, readers=["rm"])["dropped"] is None


def test_export_gives_the_same_row_back(job_table, tmp_path):
    run_dir = made_up_run(tmp_path / "run", job_table)
    raws = {"0": CHOSEN, "1": EARLIER}
    rows = [{**paired(raw, prompt_id=name), "heldout": False, "dropped": None} for name, raw in raws.items()]
    assert not any(sound(row, SIDES)["dropped"] for row in rows)
    folder = StageFolder(str(run_dir), "pairs")
    folder.clear()
    folder.write_parts(table_of(rows), "prompt_id")
    folder.commit(Manifest("pairs", "k", {}, {}), "prompt_id")

    export(str(run_dir), "pairs", str(tmp_path / "out"))
    lines = (tmp_path / "out" / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    found = {line["prompt_id"]: line for line in map(json.loads, lines)}
    for name, raw in raws.items():
        assert {key: found[name][key] for key in raw} == raw
    assert "path: data/train.jsonl" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
