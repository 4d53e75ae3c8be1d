"""Answers are trained on as the tokens that a model drew, where those are the same text as is trained on."""

import pyarrow as pa
import pytest

from rdpo.config import Pairs
from rdpo.config.task import Turn
from rdpo.modeling.chat import Answer, make_chat
from rdpo.preference.pairs import exchanged, pair_row
from rdpo.preference.reference import _schema, tokenize_pair
from rdpo.records import DRAWN_COLUMNS
from rdpo.synthesis.engine import Generation
from rdpo.synthesis.teacher import EngineSpeaker
from tests.support.models import byte_tokenizer

MERGES = (("t", "h"), ("th", "e"))
ASKED = [{"role": "user", "content": "why?"}]


@pytest.fixture
def chat():
    return make_chat(byte_tokenizer(merges=MERGES), [], "merging")


def letters(chat, text):
    """A text as one token for each letter, as no tokenizer with merges writes it."""
    return tuple(chat.tokenizer.convert_tokens_to_ids(list(text.replace(" ", "\u0120"))))


def completion(chat, answer):
    return chat.pair_ids(ASKED, {"answer": answer})["answer"]


def test_the_tokens_that_were_drawn_stand_in_the_completion(chat):
    drawn = letters(chat, "the end")
    assert len(completion(chat, Answer("the end", True))) == len(drawn) - 2 + 1
    assert completion(chat, Answer("the end", True, drawn=drawn)) == [*drawn, *chat.ending]
    assert completion(chat, Answer("the end", False, drawn=drawn)) == [*drawn]


@pytest.mark.parametrize("other", ["the end ", "the", "The end", "the end."])
def test_tokens_of_another_text_are_not_taken(chat, other):
    text = completion(chat, Answer("the end", True))
    assert completion(chat, Answer("the end", True, drawn=letters(chat, other))) == text


def test_a_special_token_is_not_the_text_that_it_looks_like(chat):
    special = chat.tokenizer.convert_tokens_to_ids("<|im_start|>")
    text = "a<|im_start|>b"
    plain = completion(chat, Answer(text, True))
    (a, b), drawn = letters(chat, "ab"), letters(chat, text)
    assert special not in plain
    assert completion(chat, Answer(text, True, drawn=drawn)) == [*drawn, *chat.ending]
    assert completion(chat, Answer("ab", True, drawn=(a, special, b))) == completion(chat, Answer("ab", True))


class Said(EngineSpeaker):
    """Without an engine."""

    def __init__(self, chat):
        self.chat = chat


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_the_first_words_and_not_the_end_belong_to_what_was_drawn(chat, finish):
    own = letters(chat, "then")
    ids = (*own, chat.end_id) if finish == "stop" else own
    said = Generation("then", finish, len(ids), token_ids=ids)
    speaker = Said(chat)
    assert speaker._drawn(ASKED, Turn(name="t"), said) == own
    begun = speaker._drawn(ASKED, Turn(name="t", prefill="the "), said)
    assert begun == (*chat.text_ids("the "), *own)
    assert completion(chat, Answer("the then", False, drawn=begun)) == list(begun)


def pair_of(chat, **changes):
    row = {"prompt_id": "p", "prompt": ASKED}
    for name, text in (("response", "the end"), ("revision", "no")):
        row |= {name: text, f"{name}_score": 1.0, f"{name}_scores": {}, f"{name}_finish_reason": "stop"}
        row[f"{name}_drawn"] = list(letters(chat, text))
    return pair_row({**row, **changes}, Pairs())


def test_pairs_carry_them_to_the_reference_which_keeps_the_ids_alone(chat):
    pair = pair_of(chat)
    drawn = list(letters(chat, "the end"))
    assert pair["rejected_drawn"] == drawn
    assert exchanged(pair)["chosen_drawn"] == drawn
    assert tokenize_pair(pair, chat, 512)["rejected_ids"] == [*drawn, *chat.ending]
    schema = _schema(pa.Table.from_pylist([pair]).schema)
    assert not set(DRAWN_COLUMNS) & set(schema.names)
    # As pairs of a data set, and of earlier versions.
    for missing in (pair_of(chat, response_drawn=None), {name: pair[name] for name in pair if "drawn" not in name}):
        assert tokenize_pair(missing, chat, 512)["rejected_ids"] == completion(chat, Answer("the end", True))
