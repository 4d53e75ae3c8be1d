"""Reasoning before an answer: rendered as the template renders it, told from the answer, never cut short in silence."""

import asyncio
import json
import math
import re
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import ValidationError

from rdpo.config import Job, Sampling
from rdpo.errors import InputError
from rdpo.evaluation.publish import verify
from rdpo.inspection.export import _with_reasoning
from rdpo.inspection.show import REASONING_STYLE, _field
from rdpo.modeling.chat import make_chat, rendering_settings
from rdpo.modeling.masking import counted_ids, read_ids
from rdpo.modeling.readers import answer_logps
from rdpo.modeling.reasoning import Unended
from rdpo.preference.pairs import pair_row, sound
from rdpo.preference.ratings import written_rating
from rdpo.preference.reference import tokenize_pair
from rdpo.preference.rewards.classifier_input import Conversations
from rdpo.synthesis.asking import ask
from rdpo.synthesis.conversation import Unusable, derive_pair, read_prompt
from rdpo.synthesis.engine import Generation
from rdpo.synthesis.given import pair_id
from rdpo.synthesis.prompts import prompt_row
from tests.support.models import CHATML, byte_tokenizer, llama
from tests.support.templates import DAY, ENDS, FOLDER, NAMES, USER, pair_of, tokenizer_of

MARKS = ("<think>", "</think>", "<｜end▁of▁sentence｜>", "<|start|>", "<|channel|>", "<|message|>")
STYLES = {
    # Template, where it asks, what it writes around the reasoning, the key of the message; none: R1's leaves it out.
    "qwen3": ("<|im_start|>assistant\n", "<think>\n", "\n</think>\n\n", "reasoning_content"),
    "qwen3_5_think": ("<|im_start|>assistant\n<think>\n", "", "\n</think>\n\n", "reasoning_content"),
    "deepseek_r1_distill": ("<｜Assistant｜><think>\n", "", "\n</think>\n\n", None),
    "gptoss": (
        "<|start|>assistant",
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "thinking",
    ),
}
FORMLESS = {"gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "idefics3"}
"""Templates that have models think and write no reasoning into a conversation's last answer, or take no text."""
THINKING = [name for name in NAMES if re.search("think|reason", (FOLDER / f"{name}.jinja").read_text())]
THOUGHT, ANSWER = "A fruit.\nAn apple is one.", "An apple."


def chat_of(name, thinking, **arguments):
    tokenizer = tokenizer_of(name, MARKS)
    stops = tokenizer.convert_tokens_to_ids([*(end for end in ENDS if end != "<|end|>"), MARKS[2]])
    return make_chat(tokenizer, stops, name, DAY, arguments=arguments, thinking=thinking)


def row_of(chat, chosen=THOUGHT, rejected="Hm.", finished=True):
    row = {**pair_of([USER], ANSWER, "carrot"), "chosen_reasoning": chosen, "rejected_reasoning": rejected}
    return tokenize_pair({**row, "rejected_finished": finished}, chat, 10_000)


@pytest.mark.parametrize("name", STYLES)
def test_reasoning_that_is_kept_is_trained_on_as_the_template_writes_it(name):
    asks, before, behind, key = STYLES[name]
    chat = chat_of(name, "keep")
    row = row_of(chat, finished=False)
    assert not row["dropped"]
    decode = chat.tokenizer.decode
    assert decode(row["prompt_ids"]).endswith(asks)
    assert decode(row["chosen_ids"]).startswith(before + THOUGHT + behind + ANSWER)
    assert decode(row["rejected_ids"]) == f"{before}Hm.{behind}carrot"
    assert row["chosen_ids"][-1] in chat.stop_ids

    if key:
        message = {"role": "assistant", "content": ANSWER, key: THOUGHT}
        arguments = chat.template.arguments
        whole = chat.tokenizer.apply_chat_template(
            [USER, message], tokenize=True, return_dict=True, strftime_now=DAY.strftime, **arguments
        )["input_ids"]
        ids = row["prompt_ids"] + row["chosen_ids"]
        assert whole[: len(ids)] == ids


@pytest.mark.parametrize("name", STYLES)
def test_masked_reasoning_is_read_and_does_not_count(name):
    kept, hidden = row_of(chat_of(name, "keep")), row_of(chat_of(name, "mask"))
    chat = chat_of(name, "mask")
    for side, answer in (("chosen", ANSWER), ("rejected", "carrot")):
        assert read_ids(hidden[f"{side}_ids"]) == kept[f"{side}_ids"]
        assert chat.tokenizer.decode(counted_ids(hidden[f"{side}_ids"])).startswith(answer)


@pytest.mark.parametrize(
    ("name", "opening"),
    [("qwen3", "<think>\n\n</think>\n\n"), ("gptoss", "<|channel|>final<|message|>")],
)
def test_without_reasoning_the_empty_block_belongs_to_the_prompt(name, opening):
    row = tokenize_pair(pair_of([USER], ANSWER, "carrot"), chat_of(name, "off"), 10_000)
    decode = chat_of(name, "off").tokenizer.decode
    assert decode(row["prompt_ids"]).endswith(opening)
    assert decode(row["chosen_ids"]).startswith(ANSWER)


@pytest.mark.parametrize("name", [*THINKING, "llama3_1", "phi3", "idefics3"])
def test_a_template_writes_reasoning_exactly_or_is_refused(name):
    tokenizer = tokenizer_of(name)
    try:
        chat = make_chat(tokenizer, tokenizer.convert_tokens_to_ids(list(ENDS)), name, DAY, thinking="keep")
    except InputError as error:
        assert name in str(error)
        assert "reasoning" in str(error) or "fails" in str(error)
        assert name.removesuffix("_training") in FORMLESS
        return
    row = row_of(chat)
    assert not row["dropped"]
    text = tokenizer.decode(row["prompt_ids"] + row["chosen_ids"])
    assert text.index(THOUGHT) < text.index(ANSWER)
    assert tokenizer.decode(row["chosen_ids"]).startswith(chat.reasoning.before + THOUGHT)
    assert chat.reasoning.split(tokenizer.decode(row["chosen_ids"][: -len(chat.ending) or None])) == (THOUGHT, ANSWER)


def test_an_argument_that_the_template_does_not_read_is_refused():
    with pytest.raises(InputError, match="reads no argument 'enable_thinkin'; it reads enable_thinking"):
        chat_of("qwen3", "off", enable_thinkin=False)
    with pytest.raises(InputError, match="reads none"):
        make_chat(byte_tokenizer(), [], "m", arguments={"effort": "low"})
    with pytest.raises(InputError, match="reads no argument 'messages'"):
        chat_of("qwen3", "off", messages=[])


def test_an_argument_reaches_the_template():
    one, other = (chat_of("gptoss", "off", reasoning_effort=effort) for effort in ("low", "high"))
    assert "Reasoning: low" in one.tokenizer.decode(one.prompt_ids([USER]))
    assert "Reasoning: high" in other.tokenizer.decode(other.prompt_ids([USER]))


def test_a_template_without_reasoning_cannot_keep_any():
    without = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    with pytest.raises(InputError, match=r"does not write reasoning.*synthesis\.reasoning"):
        make_chat(byte_tokenizer(without), [], "m", thinking="keep")


def test_a_template_that_knows_of_no_thinking_takes_the_usual_marks_within_the_text():
    chat = make_chat(byte_tokenizer(), [], "m", thinking="mask")
    row = row_of(chat)
    assert chat.tokenizer.decode(read_ids(row["chosen_ids"])) == f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}<|im_end|>"
    assert chat.tokenizer.decode(counted_ids(row["chosen_ids"])) == f"{ANSWER}<|im_end|>"


def test_an_answer_without_reasoning_is_no_side_of_a_pair_that_keeps_it(job_table):
    settings = Job.model_validate(job_table).pairs
    row = {"prompt_id": "1", "prompt": [USER]}
    for name, thought in (("response", ""), ("revision", "Hm.")):
        row |= {name: name, f"{name}_reasoning": thought, f"{name}_finish_reason": "stop"}
        row |= {f"{name}_score": 0.0, f"{name}_scores": {}}
    assert "no reasoning" in sound(pair_row(row, settings, reasoned=True), settings)["dropped"]
    assert not sound(pair_row(row, settings), settings)["dropped"]


class Engine:
    """Writes given texts, one at each request, and notes what it was asked."""

    def __init__(self, chat, *texts):
        self.chat, self.texts, self.asked = chat, list(texts), []

    async def generate(self, prompt_ids, sampling, seed, stop_ids, **extra):
        self.asked.append((prompt_ids, sampling, seed))
        text, end = self.texts.pop(0)
        ids = tuple(self.chat.tokenizer(text, add_special_tokens=False)["input_ids"])
        shown = (
            text
            if extra.get("skip_special_tokens") is False
            else self.chat.tokenizer.decode(ids, skip_special_tokens=True)
        )
        return Generation(shown, end, len(ids), prompt_tokens=len(prompt_ids), token_ids=ids)


def asked(chat, *texts, prefill="", **sampling):
    engine = Engine(chat, *texts)
    return asyncio.run(ask(engine, chat, [USER], Sampling(**sampling), 7, prefill)), engine.asked


@pytest.mark.parametrize("name", STYLES)
def test_reasoning_and_answer_are_drawn_one_after_the_other_with_a_budget_each(name):
    _, before, behind, _ = STYLES[name]
    chat = chat_of(name, "keep")
    thought = before + THOUGHT + behind.rstrip()
    answer, requests = asked(
        chat, (thought, "stop"), (f"\n\n{ANSWER}</s>", "stop"), max_tokens=20, max_reasoning_tokens=90, top_p=0.5
    )
    assert (answer.text.strip(), answer.reasoning) == (ANSWER, THOUGHT)
    (first, limit, seed), (second, other, again) = requests
    assert second == first + list(chat.tokenizer(thought, add_special_tokens=False)["input_ids"])
    assert (limit.max_tokens, other.max_tokens) == (90, 20)
    assert limit.top_p == other.top_p == 0.5
    assert limit.stop == [behind.strip()] and other.stop == []
    assert seed != again
    assert answer.tokens == len(answer.token_ids) > len(ANSWER)


@pytest.mark.parametrize(("end", "reason"), [("length", "cut off after"), ("stop", "ends inside its reasoning")])
@pytest.mark.parametrize("name", STYLES)
def test_an_answer_that_ends_inside_its_reasoning_is_none(name, end, reason):
    with pytest.raises(Unended, match=reason):
        asked(chat_of(name, "keep"), (STYLES[name][1] + THOUGHT, end))


def test_a_model_need_not_think():
    answer, _ = asked(chat_of("qwen3", "keep"), (f"{ANSWER}<|im_end|>", "stop"))
    assert (answer.text, answer.reasoning, answer.finish_reason) == (ANSWER, "", "stop")
    answer, _ = asked(chat_of("gptoss", "keep"), (f"<|channel|>final<|message|>{ANSWER}<|return|>", "stop"))
    assert (answer.text, answer.reasoning) == (ANSWER, "")

    longer, requests = asked(
        chat_of("qwen3", "keep"), ("One ", "length"), ("two.", "stop"), max_tokens=10, max_reasoning_tokens=4
    )
    assert (longer.text, longer.reasoning) == ("One two.", "") or longer.text == "Onetwo."
    assert requests[1][1].max_tokens == 6
    cut, _ = asked(chat_of("qwen3", "keep"), ("Eight it", "length"), max_tokens=8, max_reasoning_tokens=8)
    assert cut.finish_reason == "length"


def test_a_prefill_begins_the_answer_and_not_the_reasoning():
    chat = chat_of("qwen3", "keep")
    answer, requests = asked(chat, ("<think>\nHm.\n</think>", "stop"), (" apple.", "stop"), prefill="An")
    assert answer.text == " apple."
    assert chat.tokenizer.decode(requests[1][0]).endswith("</think>An")


def test_a_judge_that_thinks_is_read_behind_its_reasoning():
    chat = chat_of("qwen3", "free")
    reply, requests = asked(chat, ("<think>\nRather a 2.\n</think>", "stop"), ("Rating: 4<|im_end|>", "stop"))
    assert written_rating(reply.text, 1, 5) == 4
    assert chat.tokenizer.decode(requests[0][0]).endswith("<|im_start|>assistant\n")
    with pytest.raises(Unended):
        asked(chat, ("<think>\nRather a 2.", "stop"))


@pytest.mark.parametrize("name", ["gemma4", "llama3"])
def test_a_judge_whose_reasoning_has_no_known_form_is_asked_once(name):
    chat = chat_of(name, "free")
    reply, requests = asked(chat, ("Rating: 4", "stop"), max_tokens=9)
    assert (reply.text, reply.reasoning, requests[0][1].max_tokens) == ("Rating: 4", "", 9)
    assert "reasoning" not in rendering_settings(chat).get("rendering", {})
    with pytest.raises(InputError, match="does not write reasoning"):
        chat_of("gemma4", "keep")


def test_arguments_reach_the_template_of_a_classifier():
    tokenizer = byte_tokenizer(CHATML.replace("{% for", "{{ tone }}{% for", 1))
    read = Conversations(tokenizer, 100, False, DAY, {"tone": "calm"}).input_ids([USER], ANSWER)["input_ids"]
    assert tokenizer.decode(read).startswith("calm<|im_start|>user")


def message(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_of_a_data_set_is_told_from_the_answer(key):
    row = {"chosen": [USER, message(ANSWER, **{key: THOUGHT})], "rejected": [USER, message("carrot", **{key: None})]}
    pair = derive_pair(row, "prompt", reasoning=True)
    assert pair.answers == {"chosen": ANSWER, "rejected": "carrot"}
    assert pair.reasoning == {"chosen": THOUGHT, "rejected": ""}
    with pytest.raises(Unusable, match=f"`{key}`, which would be lost; set synthesis.reasoning"):
        derive_pair(row, "prompt")


def test_reasoning_within_the_text_is_told_from_the_answer():
    inline = {"prompt": "q", "chosen": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}", "rejected": "carrot"}
    pair = derive_pair(inline, "prompt", reasoning=True)
    assert (pair.answers["chosen"], pair.reasoning["chosen"]) == (ANSWER, THOUGHT)
    with pytest.raises(Unusable, match="chosen: the answer ends inside its reasoning"):
        derive_pair({**inline, "chosen": f"<think>{THOUGHT}"}, "prompt", reasoning=True)
    assert derive_pair(inline, "prompt").answers["chosen"] == inline["chosen"]


def test_reasoning_of_earlier_turns_is_left_out_as_templates_do_only_where_it_is_asked_for():
    earlier = [USER, message("Which?", reasoning_content="Hm."), USER]
    assert read_prompt(earlier, reasoning=True) == [USER, message("Which?"), USER]
    with pytest.raises(Unusable, match="would be lost"):
        read_prompt(earlier)


def test_pairs_that_differ_in_reasoning_alone_are_two():
    answers = {"chosen": "a", "rejected": "b"}
    plain = pair_id([USER], answers)
    first, second = (
        pair_id([USER], {**answers, "chosen_reasoning": thought, "rejected_reasoning": ""}) for thought in ("x", "y")
    )
    assert len({plain, first, second}) == 3


def test_a_row_of_the_prompts_holds_the_reasoning_of_both_answers(job_table, monkeypatch):
    chat = make_chat(byte_tokenizer(), [], "m")
    monkeypatch.setattr("rdpo.synthesis.prompts.student_chat", lambda job: chat)
    job_table["synthesis"] = {"reasoning": "keep"}
    row = {"prompt": "q", "chosen": f"<think>{THOUGHT}</think>{ANSWER}", "rejected": "carrot"}
    found = prompt_row("file", 1, row, Job.model_validate({**job_table, "pairs": {}}))
    extra = json.loads(found["extra"])
    assert (extra["chosen"], extra["chosen_reasoning"], extra["rejected_reasoning"]) == (ANSWER, THOUGHT, "")


def test_a_job_that_does_not_ask_for_reasoning_says_nothing_of_it(job_table):
    said = Job.model_validate(job_table).model_dump()
    assert "reasoning" not in said["synthesis"]
    assert "chat_template_kwargs" not in said["student"] and "max_reasoning_tokens" not in said["synthesis"]["sampling"]
    job_table["synthesis"] = {**job_table.get("synthesis", {}), "reasoning": "mask"}
    assert Job.model_validate(job_table).model_dump()["synthesis"]["reasoning"] == "mask"


def test_show_colours_reasoning_and_tokens_that_do_not_count_apart():
    thought = _field("response_reasoning", THOUGHT, None)
    assert REASONING_STYLE in {str(span.style) for span in thought.spans}
    chat = chat_of("qwen3", "mask")
    tokens = _field("chosen_ids", row_of(chat)["chosen_ids"], chat.tokenizer.decode)
    styles = [str(span.style) for span in tokens.spans if tokens.plain[span.start : span.end] in THOUGHT + ANSWER]
    assert {"not bold magenta", "not bold green"} <= set(styles)
    assert tokens.plain.endswith(f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}<|im_end|>")


def test_exported_messages_hold_their_reasoning():
    side = [{"role": "assistant", "content": ANSWER}]
    row = {"prompt": [USER], "chosen": side, "rejected": side, "chosen_reasoning": THOUGHT, "rejected_reasoning": "Hm."}
    [found] = _with_reasoning(pa.Table.from_pylist([row]), ["prompt", "chosen", "rejected"]).to_pylist()
    assert found == {
        "prompt": [USER],
        "chosen": [message(ANSWER, reasoning_content=THOUGHT)],
        "rejected": [message(ANSWER, reasoning_content="Hm.")],
    }
    # What was exported is read again as it was.
    assert derive_pair(found, "prompt", reasoning=True).reasoning == {"chosen": THOUGHT, "rejected": "Hm."}


def test_an_answer_without_reasoning_is_not_read_where_a_model_would_think():
    row = {"prompt": [USER], "x": ANSWER, "x_finish_reason": "stop", "x_reasoning": ""}

    class Reader:
        vocabulary, positions, asked = 1000, None, 0

        def __call__(self, prompts, answers):
            self.asked += 1
            return [[-1.0] * len(prompts)]

    reader = Reader()
    [without] = answer_logps([row], "x", chat_of("qwen3", "keep"), reader)
    assert math.isnan(without.nats) and not reader.asked
    [found] = answer_logps([{**row, "x_reasoning": THOUGHT}], "x", chat_of("qwen3", "keep"), reader)
    assert found.nats == -1.0
    [masked] = answer_logps([{**row, "x_reasoning": THOUGHT}], "x", chat_of("qwen3", "mask"), reader)
    assert masked.tokens < found.tokens


def test_texts_without_reasoning_are_no_measure_of_a_student_that_thinks(job_table):
    job_table |= {"retention": {"source": "texts.jsonl"}, "synthesis": {**job_table["synthesis"], "reasoning": "keep"}}
    with pytest.raises(ValidationError, match="retention: its texts have no reasoning"):
        Job.model_validate(job_table)
    job_table["synthesis"]["reasoning"] = "strip"
    Job.model_validate(job_table)


def test_a_model_that_only_answers_after_thinking_can_be_published(tmp_path):
    tokenizer = tokenizer_of("deepseek_r1_distill", MARKS)
    folder = Path(llama(tmp_path / "model", tokenizer))
    assert verify(folder, folder, is_adapter=False)["logit_difference"] == 0
