"""A segment of an answer written anew: where it is cut, what the model is given, and what the whole is then."""

import asyncio
from collections import Counter

import pytest

from rdpo.config import Job, Sampling
from rdpo.errors import InputError
from rdpo.modeling.chat import Answer, make_chat
from rdpo.stages import synthesis
from rdpo.synthesis.engine import Generation
from rdpo.synthesis.instructions import check_fields, check_prefills, check_spoken_alone, load_task
from rdpo.synthesis.rewriting import cut_answer, joined
from rdpo.synthesis.teacher import Conversation, EngineSpeaker
from rdpo.synthesis.voices import legs
from tests.support.models import byte_tokenizer

ASKED = [{"role": "user", "content": "why?"}]
TASK = """
name = "segment"

[[turns]]
name = "plain"
user = "Plainly: {{ prompt }}"

[[turns]]
name = "rewritten"
rewrites = "plain"
max_tokens = 4
"""


@pytest.fixture
def chat():
    return make_chat(byte_tokenizer(merges=(("t", "h"), ("th", "e"))), [], "merging")


def only(*places):
    """A draw by which these places come first."""
    return lambda place: places.index(place) if place in places else len(places) + place


def test_a_segment_is_taken_out_at_the_place_that_is_drawn(chat):
    cut = cut_answer("the end of the day", chat, 4, only(1))
    assert (cut.before, cut.behind, cut.length) == ("the", " of the day", 4)
    assert chat.decoded(cut.ids_before) == "the"
    assert chat.decoded(cut.ids_behind) == " of the day"
    assert len(cut.ids_before) + 4 + len(cut.ids_behind) == len(chat.text_ids("the end of the day"))


def test_it_begins_where_the_authors_program_lets_it_begin(chat):
    # 12 tokens: with 4 of them taken out there are places 0 to 12 - 4 - 2; with all of them only the first.
    last = cut_answer("abcdefghijkl", chat, 4, lambda place: -place)
    assert (last.before, last.behind) == ("abcdef", "kl")
    for wanted in (10, 11, 12, 30):
        cut = cut_answer("abcdefghijkl", chat, wanted, lambda place: -place)
        assert (cut.before, cut.length) == ("", min(wanted, 12))


def test_a_place_within_a_character_is_passed_over(chat):
    # The bytes of é are two tokens: a cut between them gives back neither its text nor its tokens.
    text = "aébcdefgh"
    cut = cut_answer(text, chat, 3, only(2, 5))
    assert (cut.before, cut.behind) == ("aébc", "gh")
    assert {cut_answer(text, chat, 3, only(place)).before for place in range(6)} == {"", "a", "aé", "aéb", "aébc"}


def test_a_place_where_the_first_words_alone_have_other_tokens_is_passed_over(chat):
    # Of "the" no tokenizer with these merges writes "t" and "he"; a place behind "t" does not exist.
    text = "a the b"
    assert all(chat.text_ids(cut_answer(text, chat, 1, only(place)).before) for place in (1, 2))
    with pytest.raises(ValueError, match="no 1 tokens of the answer can be taken out of it exactly"):
        cut_answer("\ufffd", make_chat(Broken(), [], "broken"), 1, only(0))


class Broken:
    """A tokenizer that gives no text back as it was."""

    def __new__(cls):
        tokenizer = byte_tokenizer()
        decode = tokenizer.decode
        tokenizer.decode = lambda *given, **named: decode(*given, **named).lower() + "!"
        return tokenizer


def letters(chat, text):
    return tuple(chat.tokenizer.convert_tokens_to_ids(list(text.replace(" ", "\u0120"))))


def test_the_other_words_stand_around_what_was_written(chat):
    cut = cut_answer("the end of the day", chat, 4, only(1))
    said = Generation(" sea", "length", 4, token_ids=letters(chat, " sea"), drawn=(*cut.ids_before, 1))
    whole = joined(cut, said, "stop", chat)
    assert (whole.text, whole.finish_reason) == ("the sea of the day", "stop")
    assert whole.drawn == (*cut.ids_before, 1, *cut.ids_behind)
    assert joined(cut, said, "length", chat).finish_reason == "length"


def test_an_answer_that_ends_within_the_segment_ends_there(chat):
    cut = cut_answer("the end of the day", chat, 4, only(1))
    said = Generation(".", "stop", 2, token_ids=(*letters(chat, "."), chat.end_id))
    assert joined(cut, said, "length", chat).text == "the."
    assert joined(cut, said, "length", chat).finish_reason == "stop"


def test_a_segment_with_nothing_behind_it_is_cut_off(chat):
    cut = cut_answer("abc", chat, 9, only(0))
    assert (cut.before, cut.length, cut.behind) == ("", 3, "")
    said = Generation("xyz", "length", 3, token_ids=letters(chat, "xyz"))
    assert joined(cut, said, "stop", chat).finish_reason == "length"


def test_a_segment_that_ends_within_a_character_is_refused(chat):
    cut = cut_answer("abcdefgh", chat, 2, only(1))
    half = (*letters(chat, "x"), *chat.text_ids("é")[:1])
    with pytest.raises(ValueError, match="the tokens of the new segment do not give its text between the others"):
        joined(cut, Generation("x", "length", 2, token_ids=half), "stop", chat)


class Letters:
    """In place of an engine: it notes what it is given, and says the same letters as often as it is asked to."""

    def __init__(self, chat):
        self.chat, self.asked = chat, []

    async def generate(self, prompt, sampling, seed, stops):
        self.asked.append((list(prompt), sampling.max_tokens, seed))
        text = (
            ("said by the speaker " * 9)[: sampling.max_tokens] if len(self.asked) == 1 else "z" * sampling.max_tokens
        )
        return Generation(text, "length", sampling.max_tokens, token_ids=letters(self.chat, text))


class Speaker(EngineSpeaker):
    """Without a model."""

    def __init__(self, chat):
        self.chat, self.engine, self.keeps_tokens = chat, Letters(chat), True


@pytest.fixture
def spoken(chat, job_table, tmp_path):
    (tmp_path / "task.toml").write_text(TASK)
    job_table["synthesis"]["task"] = str(tmp_path / "task.toml")

    def speak(name="a", seed=0, max_tokens=24):
        job = Job.model_validate({**job_table, "seed": seed})
        speaker, task = Speaker(chat), load_task(job.synthesis.task)
        conversation = Conversation(job, task, Sampling(max_tokens=max_tokens), speaker.say, chat, None, True)
        row = {"prompt_id": name, "prompt": ASKED, "extra": "{}"}
        return asyncio.run(conversation(row)), speaker.engine.asked

    return speak


def test_a_turn_rewrites_a_segment_of_an_earlier_answer_to_its_own_question(spoken, chat):
    row, (_, (prompt, tokens, _)) = spoken()
    plain, rewritten = row["plain"], row["rewritten"]
    start = rewritten.index("zzzz")
    assert rewritten == plain[:start] + "zzzz" + plain[start + 4 :] != plain
    # Asked for the bare prompt, with the answer's own tokens before the segment.
    assert prompt == chat.prompt_ids(ASKED) + chat.text_ids(plain[:start])
    assert tokens == row["rewritten_tokens"] == 4
    assert row["rewritten_finish_reason"] == row["plain_finish_reason"] == "length"
    drawn = row["rewritten_drawn"]
    assert chat.decoded(drawn) == rewritten
    assert chat.pair_ids(ASKED, {"one": Answer(rewritten, False, drawn=tuple(drawn))})["one"] == drawn


def test_the_place_belongs_to_seed_row_and_turn(spoken):
    places = Counter(spoken(f"row {number}")[0]["rewritten"].index("zzzz") for number in range(60))
    assert set(places) <= set(range(19)) and len(places) > 10
    assert spoken("row 7")[0] == spoken("row 7")[0]
    assert len({spoken("row 7", seed)[0]["rewritten"] for seed in range(6)}) > 2


def test_an_answer_that_cannot_be_cut_drops_the_row(spoken, chat, monkeypatch):
    monkeypatch.setattr(chat.tokenizer, "decode", lambda *given, **named: "other")
    row, _ = spoken()
    assert row["dropped"] == "rewritten: no 4 tokens of the answer can be taken out of it exactly"


def test_a_rewriting_turn_waits_for_the_answer_that_another_voice_speaks(tmp_path):
    (tmp_path / "task.toml").write_text(TASK + 'voice = "policy"\n')
    task = load_task(str(tmp_path / "task.toml"))
    assert [leg.turns for leg in legs(task)] == [("plain",), ("rewritten",)]


GIVEN = """
name = "given"

[[turns]]
name = "human"
given = "{{ answer }}"

[[turns]]
name = "rewritten"
rewrites = "human"
max_tokens = 4
"""


def test_an_answer_may_be_a_column_of_the_prompts(chat, job_table, tmp_path):
    (tmp_path / "task.toml").write_text(GIVEN)
    job_table["synthesis"]["task"] = str(tmp_path / "task.toml")
    job = Job.model_validate(job_table)
    task, speaker = load_task(job.synthesis.task), Speaker(chat)
    row = {"prompt_id": "a", "prompt": ASKED, "extra": '{"answer": "Because of the rain."}'}
    check_fields(task, row, {})
    done = asyncio.run(Conversation(job, task, Sampling(), speaker.say, chat, None, True)(dict(row)))
    assert (done["human"], done["human_finish_reason"], done["human_tokens"]) == ("Because of the rain.", "stop", 0)
    assert done["human_drawn"] == []
    assert len(speaker.engine.asked) == 1
    assert done["rewritten_finish_reason"] == "stop"
    assert done["rewritten"] != done["human"]
    with pytest.raises(InputError, match="uses answer"):
        check_fields(task, {**row, "extra": "{}"}, {})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ('rewrites = "later"', "rewrites = 'later' is no earlier answer"),
        ('rewrites = "plain"\nprefill = "So"', "its first words are another answer's; remove `prefill`"),
        ('given = "x"\nprefill = "So"', "its first words are another answer's; remove `prefill`"),
        ('given = "x"\nsamples = 2', "its answer is given; remove `rewrites` and `samples`"),
        ('given = "x"\nrewrites = "plain"', "its answer is given; remove `rewrites` and `samples`"),
    ],
)
def test_words_from_two_places_are_refused(tmp_path, changed, message):
    (tmp_path / "task.toml").write_text(TASK.replace('rewrites = "plain"', changed))
    with pytest.raises(InputError, match=message):
        load_task(str(tmp_path / "task.toml"))


def test_servers_and_reasoning_are_refused(tmp_path):
    (tmp_path / "task.toml").write_text(TASK)
    (tmp_path / "given.toml").write_text(GIVEN)
    task = load_task(str(tmp_path / "task.toml"))
    with pytest.raises(InputError, match="turn `rewritten` rewrites an answer, which an endpoint cannot"):
        check_prefills(task.turns)
    with pytest.raises(InputError, match="turn `rewritten` rewrites an answer, before which nothing was thought"):
        check_spoken_alone(task)
    with pytest.raises(InputError, match="turn `human` has a given answer, before which nothing was thought"):
        check_spoken_alone(load_task(str(tmp_path / "given.toml")))


def test_the_stage_depends_on_what_is_rewritten(job_table, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "speaker_settings", lambda job: {})
    found = []
    for text in (TASK, TASK.replace('rewrites = "plain"\n', ""), TASK.replace("max_tokens = 4", "max_tokens = 5")):
        (tmp_path / "task.toml").write_text(text)
        job_table["synthesis"]["task"] = str(tmp_path / "task.toml")
        found.append(synthesis.settings(Job.model_validate(job_table))["turns"]["turns"])
    assert found[0] != found[1] and found[0] != found[2]
    assert "rewrites" not in found[1][1] and "given" not in found[1][1]
