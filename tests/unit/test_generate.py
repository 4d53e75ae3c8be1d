"""Two models' answers side by side, and answers that are refined before they count."""

import asyncio
from contextlib import asynccontextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from rdpo.cluster.pools import Pool
from rdpo.config import Job
from rdpo.evaluation.compare import divergence
from rdpo.evaluation.generate import (
    DRAWN,
    START,
    TRAINED,
    UNREADABLE,
    Answerer,
    Divergence,
    add_divergence,
    answer_prompts,
    side_by_side,
)
from rdpo.modeling.probe import ReadAs
from rdpo.modeling.readers import PolicyReader, answer_logps
from rdpo.modeling.weights import ModelRef
from rdpo.records import table_of
from rdpo.synthesis.engine import Generation
from tests.support.jobs import valid_job
from tests.support.models import byte_tokenizer, save_model


def answered(name, contender, answer, dropped=None):
    columns = {f"{side}{end}": None for side in ("start", "trained") for end in ("", "_tokens")}
    own = {contender: answer, f"{contender}_tokens": len(answer)}
    return {"prompt_id": name, "prompt": "q", **columns, **own, "contender": contender, "dropped": dropped}


def test_a_prompt_gets_both_answers_whatever_their_order():
    rows = [
        answered("b", "start", "one"),
        answered("a", "trained", "four"),
        answered("b", "trained", ""),
        answered("a", "start", "six"),
    ]
    merged = {row["prompt_id"]: row for row in side_by_side(rows, ["start", "trained"])}
    assert len(merged) == 2
    assert (merged["a"]["start"], merged["a"]["trained"], merged["a"]["trained_tokens"]) == ("six", "four", 4)
    assert (merged["b"]["start"], merged["b"]["trained"], merged["b"]["start_tokens"]) == ("one", "", 3)
    assert "contender" not in merged["a"]


def test_a_prompt_that_one_model_cannot_answer_is_dropped():
    rows = [answered("a", "start", "", "no room"), answered("a", "trained", "yes")]
    assert side_by_side(rows, ["start", "trained"])[0]["dropped"] == "no room"
    assert side_by_side(rows[::-1], ["start", "trained"])[0]["dropped"] == "no room"


def test_answers_that_are_known_are_not_asked_again(job_table, monkeypatch):
    asked = []

    class Answers:
        def __init__(self, pool, table, answerer, models, **_):
            asked.append((sorted(models), table.to_pylist()))

        def take_all(self):
            return [
                {**row, row["contender"]: "new", f"{row['contender']}_tokens": 1, "dropped": None}
                for row in asked[-1][1]
            ]

    monkeypatch.setattr(Pool, "map", lambda *given, **arguments: Answers(*given, **arguments))
    monkeypatch.setattr("rdpo.evaluation.generate.open_crash_counts", lambda: None)
    monkeypatch.setattr("ray.data.from_arrow", lambda table: table)
    rows = [{"prompt_id": name, "prompt": [{"role": "user", "content": name}], "extra": "{}"} for name in "ab"]
    models = {START: ModelRef("old"), TRAINED: ModelRef("better")}
    known = {"start": "known", "start_finish_reason": "stop", "start_tokens": 9}
    job_table["evaluation"] = {"kl_answers": 0}
    merged = answer_prompts(rows, Job.model_validate(job_table), models, {START: {"a": known}})
    assert {row["prompt_id"]: (row["start"], row["trained"]) for row in merged} == {
        "a": ("known", "new"),
        "b": ("new", "new"),
    }
    assert [(row["contender"], row["prompt_id"]) for row in asked[0][1]] == [
        (START, "b"),
        (TRAINED, "a"),
        (TRAINED, "b"),
    ]
    answer_prompts(rows, Job.model_validate(job_table), models, {START: {"a": known, "b": known}})
    assert asked[1][0] == [TRAINED]


class Engine:
    """Answers every conversation with the number of its messages, and knows whose weights it holds."""

    def __init__(self):
        self.held = None

    @asynccontextmanager
    async def holding(self, folder):
        self.held = folder
        yield

    async def generate(self, prompt_ids, sampling, seed, stop_ids):
        return Generation(f"{self.held} answers {prompt_ids}", "stop", 5, None, 7, 3)


class Chat:
    stop_ids = ()
    reasoning = None

    def prompt_ids(self, messages, prefill=""):
        return len(messages)


def test_only_the_trained_models_answer_goes_through_the_turns_of_the_task(job_table):
    answerer = object.__new__(Answerer)
    answerer.job = Job.model_validate({**job_table, "evaluation": {"refine": True}})
    answerer.models, answerer.engine, answerer.chat = {"start": "old", "trained": "new"}, Engine(), Chat()
    asked = {"prompt_id": "a", "prompt": [{"role": "user", "content": "why?"}], "extra": "{}"}
    rows = [asyncio.run(answerer.answer({**asked, "contender": side})) for side in ("start", "trained")]
    (row,) = side_by_side(rows, ["start", "trained"])
    # Answer, critique and revision: the last is said after five messages.
    assert (row["start"], row["trained"]) == ("old answers 1", "new answers 5")
    assert (row["trained_tokens"], row["trained_finish_reason"]) == (5, "stop")
    del answerer.engine


def test_what_the_model_cannot_read_is_dropped_with_the_reason(tmp_path):
    import pyarrow as pa
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = byte_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=48, n_embd=16, n_layer=1, n_head=2)
    folder = save_model(tmp_path / "model", GPT2LMHeadModel(config), tokenizer)
    rows = [
        {"prompt": [{"role": "user", "content": "x"}], "answer": answer, "answer_finish_reason": "stop"}
        for answer in ("short", "long " * 20)
    ]
    table = pa.Table.from_pylist([{**row, "dropped": None} for row in rows])
    job = Job.model_validate(valid_job(folder, tmp_path))
    found = Divergence(job, {TRAINED: folder, START: None}, "answer")(table).to_pylist()
    assert [(row["kl"], row["dropped"]) for row in found] == [(0.0, None), (None, UNREADABLE)]


def test_two_passes_with_a_model_each_measure_what_one_pass_with_both_does(wordy_models, tmp_path):
    job = Job.model_validate(valid_job(wordy_models[1], tmp_path))
    answers = ["short", "a longer answer", "", "dropped before"]
    rows = [
        {"prompt_id": text, "prompt": [{"role": "user", "content": "x"}], "answer": text}
        | {"answer_finish_reason": "stop", "dropped": text if text.startswith("dropped") else None}
        for text in answers
    ]
    table = table_of(rows)
    once = Divergence(job, {TRAINED: wordy_models[0], START: None}, "answer")(table)
    first = Divergence(job, {TRAINED: wordy_models[0]}, "answer")(table)
    assert "kl" not in first.column_names
    assert Divergence(job, {START: None}, "answer")(first).to_pylist() == once.to_pylist()
    measured = once["kl"].to_pylist()
    assert [kl is None for kl in measured] == [False, False, True, True]
    assert measured[0] != measured[1]


def test_a_gpu_holds_one_of_the_two_models_at_a_time(job_table, monkeypatch):
    passes = []

    class Rows:
        def materialize(self):
            passes[-1].append("made")
            return self

    def asked(pool, rows, actor, models, **_):
        passes.append(list(models))
        return rows

    monkeypatch.setattr(Pool, "map", asked)
    add_divergence(Rows(), Job.model_validate(job_table), "folder", "drawn")
    assert passes == [[TRAINED, START]]
    passes.clear()
    job_table["reference"] |= {"gpus": 1}
    add_divergence(Rows(), Job.model_validate(job_table), "folder", "drawn")
    assert passes == [[TRAINED, "made"], [START, "made"]]


class Drawing(Engine):
    """Keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    async def generate(self, prompt_ids, sampling, seed, stop_ids):
        self.asked.append((sampling.temperature, sampling.top_p, sampling.max_tokens, seed))
        return Generation(" text ", "stop", 3, None, 7, 3, (5, 6, 2))


def test_the_answer_for_kl_is_drawn_untempered_and_kept_as_tokens(job_table):
    answerer = object.__new__(Answerer)
    sampling = {"temperature": 0.2, "top_p": 0.9, "max_tokens": 9}
    answerer.job = Job.model_validate({**job_table, "evaluation": {"sampling": sampling}})
    answerer.models, answerer.engine, answerer.chat = {TRAINED: "new", DRAWN: "new"}, Drawing(), Chat()
    asked = {"prompt_id": "a", "prompt": [{"role": "user", "content": "why?"}], "extra": "{}"}
    rows = [asyncio.run(answerer.answer({**asked, "contender": column})) for column in (TRAINED, DRAWN)]
    compared, drawn = answerer.engine.asked
    assert (compared[:3], drawn[:3]) == ((0.2, 0.9, 9), (1.0, 1.0, 9))
    assert compared[3] != drawn[3]
    (row,) = side_by_side(rows, [TRAINED, DRAWN])
    assert (row["drawn_ids"], row["drawn_tokens"]) == ([5, 6, 2], 3)
    assert "trained_ids" not in row
    del answerer.engine


@pytest.mark.parametrize(("settings", "drawn"), [({"kl_answers": 1}, ["a"]), ({}, ["a", "b"]), ({"refine": True}, [])])
def test_prompts_for_kl_are_the_first_and_self_refinement_has_none(job_table, monkeypatch, settings, drawn):
    asked = []

    def answers(pool, table, *_, **__):
        asked.extend(table.to_pylist())
        return SimpleNamespace(take_all=lambda: [{**row, row["contender"]: "x"} for row in asked])

    monkeypatch.setattr(Pool, "map", answers)
    monkeypatch.setattr("rdpo.evaluation.generate.open_crash_counts", lambda: None)
    monkeypatch.setattr("ray.data.from_arrow", lambda table: table)
    rows = [{"prompt_id": name, "prompt": [{"role": "user", "content": name}], "extra": "{}"} for name in "ba"]
    answer_prompts(
        rows,
        Job.model_validate({**job_table, "evaluation": settings}),
        {START: ModelRef("old"), TRAINED: ModelRef("new")},
    )
    assert [row["prompt_id"] for row in asked if row["contender"] == DRAWN] == drawn


class Bigram:
    """A policy over few tokens whose next token depends on the last one alone: its KL can be counted out."""

    packed = False
    config = SimpleNamespace(vocab_size=10)
    causal = torch.nn.Module()

    def __init__(self, seed):
        self.table = 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self.logps = self.table.log_softmax(-1).double()

    def batch(self, prompts, answers):
        return Pairs(zip(prompts, answers, strict=True))

    def __call__(self, pairs):
        return torch.stack([sum(self.logps[a, b] for a, b in pairwise([x[-1], *y])) for x, y in pairs])

    def draw(self, begin, length, generator, temperature=1.0):
        tokens = [begin]
        for _ in range(length):
            chances = (self.table[tokens[-1]] / temperature).softmax(-1)
            tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
        return tokens[1:]


class Pairs(list):
    def to(self, device):
        return self


VOCABULARY, LENGTH = 5, 3


def exact_kl(policy, reference, begin, length):
    """KL over all answers of so many tokens, by the chain rule."""
    if not length:
        return 0.0
    chances, difference = policy.logps[begin].exp(), policy.logps[begin] - reference.logps[begin]
    rest = torch.tensor([exact_kl(policy, reference, token, length - 1) for token in range(VOCABULARY)])
    return float((chances * (difference + rest)).sum())


class TextOfOneToken:
    """Reads any answer as another token than those that were drawn."""

    def prompt_ids(self, messages, prefill=""):
        return [0]

    def completion_ids(self, answer, finished):
        return [1]


@pytest.mark.parametrize(("temperature", "holds"), [(1.0, True), (0.4, False)])
def test_kl_is_the_exact_one_and_only_without_temperature(temperature, holds):
    policy, reference, generator = Bigram(1), Bigram(2), torch.Generator().manual_seed(0)
    chat, read_as = TextOfOneToken(), ReadAs("padded", 0, packable=False)
    rows = [
        {"prompt": [], "drawn": "text", "drawn_finish_reason": "length", "prompt_id": str(place), "drawn_tokens": 3}
        | {"drawn_ids": policy.draw(0, LENGTH, generator, temperature)}
        for place in range(3000)
    ]
    readers = (PolicyReader(model, read_as, "cpu", 10_000) for model in (policy, reference))
    after, before = (answer_logps(rows, DRAWN, chat, reader) for reader in readers)
    measured = [{**row, "kl": (one - other).nats} for row, one, other in zip(rows, after, before, strict=True)]
    kl = divergence(measured)["kl"]
    assert kl["high"] - kl["low"] < 0.3
    # Three standard errors where the interval has two.
    error = abs(kl["mean"] - exact_kl(policy, reference, 0, LENGTH))
    assert (error < 1.5 * (kl["high"] - kl["mean"])) == holds
