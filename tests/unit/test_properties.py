"""What holds for any text, any settings and any sizes: identities, ratings, job files, plans."""

import json
import math
import tomllib
from contextlib import suppress

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rdpo.config import Job, load_job, to_toml
from rdpo.config.files import _apply_override
from rdpo.errors import InputError
from rdpo.modeling.packing import PairSize, batch_tokens, epoch_order, epoch_steps, plan_step
from rdpo.preference.ratings import LEAST_SHARE, expected_rating, rating_share, rating_value, written_rating
from rdpo.records import alive, clean, digest, draw_seed, drop, prompt_id, table_of, unit_draw, visible
from rdpo.synthesis.defects import defects
from rdpo.synthesis.instructions import check_template, render
from tests.support.jobs import valid_job, write_job

QUICK = settings(max_examples=100, deadline=None)
ANY = st.text(st.characters(), max_size=12)
PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | ANY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY, inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": ANY, "content": ANY}), max_size=3)


def same(one, other):
    """Whether two values are the same in JSON, where 1, 1.0 and true are three."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@given(st.lists(JSON, max_size=3), st.lists(JSON, max_size=3))
@example(["ab"], ["a", "b"])
@example([1], ["1"])
@example([True], [1])
@example([["a"], "b"], [["a", "b"]])
@QUICK
def test_digests_are_equal_where_the_parts_are(one, other):
    assert (digest(*one) == digest(*other)) == same(one, other)
    assert digest(*one) == digest(*json.loads(json.dumps(one)))


@given(MESSAGES, MESSAGES)
@example([{"role": "a", "content": "b"}], [{"role": "b", "content": "a"}])
@example([{"role": "a", "content": "b"}] * 2, [{"role": "a", "content": "b"}])
@QUICK
def test_a_prompt_is_known_by_all_its_messages_and_nothing_else(one, other):
    assert (prompt_id(one) == prompt_id(other)) == (one == other)
    assert prompt_id([{"more": 1, **message} for message in one]) == prompt_id(one)


@given(st.integers(0, 2**32 - 1), ANY, ANY)
@QUICK
def test_draws_are_in_range_and_belong_to_seed_row_and_role(seed, row, role):
    assert 0 <= draw_seed(seed, row, role) < 2**31
    assert 0 <= unit_draw(seed, row, role) < 1
    others = {unit_draw(seed + 1, row, role), unit_draw(seed, row + "x", role), unit_draw(seed, row, role + "x")}
    assert unit_draw(seed, row, role) not in others


@given(ANY)
@example("\x1b[31m\x9b\r\u202e\u2066\u200f\U000e0041\ud800")
@QUICK
def test_clean_and_visible_text_can_be_stored_and_printed(text):
    assert pa.array([clean(text)]).to_pylist() == [clean(text)]
    assert clean(clean(text)) == clean(text)
    assert visible(text) == clean(visible(text))
    assert not set(visible(text)) & {"\x1b", "\x9b", "\r", "\u202e", "\u2066", "\u200f", "\U000e0041"}
    assert visible(visible(text)) == visible(text)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(-(2**40), 2**40), min_size=1), max_size=6), ANY)
@QUICK
def test_tables_have_every_column_and_dropped_rows_are_not_alive(rows, reason):
    table = table_of([drop(row, reason) if row.get("a", 0) % 2 else row for row in rows])
    assert set(table.column_names) == {"dropped"}.union(*rows)
    for row, stored in zip(rows, table.to_pylist(), strict=True):
        assert {name: stored[name] for name in stored if name != "dropped"} == {
            name: row.get(name) for name in table.column_names if name != "dropped"
        }
        assert alive(stored) == (stored["dropped"] is None) == (not row.get("a", 0) % 2)


NUMBERS = st.floats(-5, 5).map(lambda number: round(number, 2))


@given(st.text("0123456789+-\u2212.,/[]() outfx\n\u0663\u00b2", max_size=40) | ANY)
@example("9" * 400)
@QUICK
def test_a_written_rating_is_on_the_scale_or_none(reply):
    rating = written_rating(reply, -5, 5)
    assert math.isnan(rating) or -5 <= rating <= 5


@given(st.text("abc [(\n", max_size=20), NUMBERS, st.sampled_from(["{}", "[[{}]]", "{}/5", "{} out of 5", "{}."]))
@QUICK
def test_a_rating_is_read_as_it_was_written(before, number, form):
    assert written_rating(f"{before} {form.format(number)}", -5, 5) == number
    assert written_rating(f"[[1]] {before} {form.format(-0.0)} [[{number}]] or 9", -5, 5) == number


@given(st.dictionaries(st.integers(0, 5), NUMBERS, min_size=1), st.dictionaries(st.integers(0, 9), st.floats(-30, 0)))
@QUICK
def test_an_expected_rating_lies_between_the_ratings(values, logprobs):
    expected = expected_rating(values, logprobs)
    met = [values[token] for token in values.keys() & logprobs.keys()]
    unlikely = rating_share(values, logprobs) < LEAST_SHARE
    assert math.isnan(expected) if unlikely else min(met) - 1e-9 <= expected <= max(met) + 1e-9


@given(ANY, st.integers(0, 9))
@QUICK
def test_any_word_is_worth_its_position_or_its_number(word, position):
    assert math.isfinite(rating_value(word, position))


@pytest.mark.parametrize("filler", ["1", " ", "! ", "!", "\n", "no changes ", "1.", "-1", "i can't "])
def test_no_text_is_divided_in_every_way(filler):
    """A hundred thousand characters: work that grows with the square of them would be stopped by the suite's limit."""
    text = "!" + filler * (100_000 // len(filler)) + "x"
    written_rating(text, 1, 5)
    defects({"response_finish_reason": "stop", "response": text, "revision": text}, "response", "revision")


@given(ANY)
@QUICK
def test_text_in_a_template_stays_text(text):
    assert render("{{ prompt }}", {"prompt": text}) == text
    assert render("{{ prompt }}", {"prompt": "{{ 7 * 7 }}{% raw %}"}) == "{{ 7 * 7 }}{% raw %}"


TEMPLATES = st.lists(
    st.sampled_from(
        ["{{", "}}", "{%", "%}", "prompt", "|", "(", ")", ".", "x", "'", " ", "for", "in", "if", "-", "1", "["]
    )
).map("".join)


@given(TEMPLATES)
@example("{{ prompt.encode('nope') }}")
@example("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
@example("{{ prompt.__class__.__mro__ }}")
@example("{{ [1].index(2) }}")
@example("{{ 1 / 0 }}")
@example("{{" + "(" * 2000 + "1" + ")" * 2000 + "}}")
@example("{{ range(10 ** 9) }}")
@QUICK
def test_a_template_gives_text_or_a_reason(template):
    with suppress(InputError):
        check_template(template, "here")
    try:
        assert isinstance(render(template, {"prompt": "p", "x": {"y": [1]}}), str)
    except ValueError as reason:
        assert str(reason)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The table of a job with most sections."""
    table = valid_job("model", tmp_path_factory.mktemp("job"))
    return table | {"retention": {"source": "texts.jsonl"}, "training": {"lora": {"rank": 2}, "batch_size": 4}}


WORDS = st.fixed_dictionaries(
    {},
    optional={
        "model": PLAIN,
        "revision": PLAIN,
        "column": PLAIN,
        "system": PLAIN,
        "templates": st.lists(PLAIN, max_size=2),
        "values": st.dictionaries(PLAIN, PLAIN, max_size=2),
        "options": st.dictionaries(
            PLAIN, PLAIN | st.booleans() | st.integers(-(2**60), 2**60) | st.lists(PLAIN, max_size=2), max_size=2
        ),
        "margin": st.floats(allow_nan=False, allow_infinity=False),
        "learning_rate": st.floats(min_value=5e-324, allow_infinity=False),
        "seed": st.integers(0, 2**32 - 1),
    },
)


@given(words=WORDS)
@QUICK
def test_a_resolved_job_reads_back_the_same_whatever_its_words(whole, words, tmp_path_factory):
    table = json.loads(json.dumps(whole))
    table["student"] |= {key: words[key] for key in ("model", "revision") if key in words}
    table["prompts"] |= {key: words[key] for key in ("column", "system", "templates") if key in words}
    table["synthesis"] |= {"values": words.get("values", {})}
    table["synthesis"]["engine"] |= {"options": words.get("options", {})}
    table["training"] |= {key: words[key] for key in ("margin", "learning_rate") if key in words}
    table["seed"] = words.get("seed", 0)
    job = Job.model_validate(table)
    path = tmp_path_factory.mktemp("resolved") / "config.toml"
    path.write_text(to_toml(job), encoding="utf-8")
    assert load_job(path) == job


@given(whole_value=JSON.filter(lambda value: value is not None), key=st.sampled_from(["a", "a.b", "rewards.0.name"]))
@QUICK
def test_what_is_set_is_the_toml_value(whole_value, key):
    import tomli_w

    try:
        text = tomli_w.dumps({"value": whole_value}, multiline_strings=False).removeprefix("value = ").rstrip("\n")
        expected = tomllib.loads(f"value = {text}")["value"]
    except (TypeError, UnicodeError, tomllib.TOMLDecodeError, KeyError):
        return
    if isinstance(whole_value, dict) or clean(text) != text:
        return
    table = {"rewards": [{"name": "one"}]}
    _apply_override(table, f"{key}={text}")
    target = table
    for part in key.split("."):
        target = target[int(part)] if isinstance(target, list) else target[part]
    assert same(target, expected)


@given(ANY | st.text("ab.0=[]{}\"'\n#\u0663\u00b2 ", max_size=20))
@example("rewards.\u00b2.name=x")
@example("rewards.\u0660.name=x")
@example("rewards." + "1" * 5000 + ".name=x")
@example("a=" + "[" * 5000)
@example("a=" + "1" * 5000)
@example("a=\udc80")
@example("rewards.0=x")
@example("name.0.x=1")
@QUICK
def test_any_override_is_taken_or_is_one_message(override):
    table = {"rewards": [{"name": "one"}], "name": "n"}
    try:
        _apply_override(table, override)
    except InputError as refusal:
        assert str(refusal).startswith("--set")
    else:
        json.dumps(table, default=str).encode()
        assert isinstance(table["rewards"], list) or override.partition("=")[0].strip() == "rewards"


def test_a_line_break_in_a_value_begins_no_other_key():
    table = {}
    _apply_override(table, "a=1\nb = 2")
    assert table == {"a": "1\nb = 2"}


@pytest.mark.parametrize("content", ["a = " + "[" * 5000, "a = " + "1" * 5000, "a" + ".a" * 5000 + " = 1"])
def test_a_job_file_that_exhausts_the_parser_is_one_message(tmp_path, content):
    (tmp_path / "job.toml").write_text(content)
    with pytest.raises(InputError, match=r"job\.toml"):
        load_job(tmp_path / "job.toml")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_of_a_job_are_finite(tmp_path, job_table, value):
    with pytest.raises(InputError, match=r"training\.margin"):
        load_job(write_job(tmp_path / "job.toml", job_table), [f"training.margin={value}"])


SIZES = st.lists(st.builds(PairSize, *[st.integers(1, 60)] * 3), min_size=1, max_size=40)


@given(st.data(), SIZES, st.integers(1, 7), st.booleans())
@QUICK
def test_a_plan_has_every_pair_once_within_the_budget_in_equally_many_forwards(data, sizes, workers, packed):
    pairs = data.draw(st.lists(st.integers(0, len(sizes) - 1), unique=True, min_size=min(workers, len(sizes))))
    if len(pairs) < workers:
        return
    largest = max(batch_tokens([sizes[pair]], packed) for pair in pairs)
    budget = data.draw(st.integers(largest, 4 * largest))
    plan = plan_step(pairs, sizes, workers, budget, packed)
    assert len(plan) == workers
    assert len({len(share) for share in plan}) == 1
    assert sorted(pair for share in plan for micro in share if not micro.idle for pair in micro.pairs) == sorted(pairs)
    assert all(batch_tokens([sizes[i] for i in micro.pairs], packed) <= budget for share in plan for micro in share)
    # A worker that only repeats would have no gradient of its own.
    assert all(any(not micro.idle for micro in share) for share in plan)
    # Whoever counts on the plan gets it from the same facts, in whatever order the pairs are named.
    assert plan_step(pairs[::-1], sizes, workers, budget, packed) == plan


@given(st.integers(0, 300), st.integers(0, 2**32 - 1), st.integers(0, 5))
@QUICK
def test_an_epoch_has_every_pair_once_in_an_order_of_its_own(count, seed, epoch):
    order = epoch_order(count, seed, epoch)
    assert sorted(order) == list(range(count))
    assert order == epoch_order(count, seed, epoch)
    assert count < 20 or order != epoch_order(count, seed, epoch + 1)


@given(st.integers(0, 500), st.integers(1, 40))
@QUICK
def test_the_steps_of_an_epoch_take_every_pair(pairs, batch):
    taken = [min(batch, pairs - step * batch) for step in range(epoch_steps(pairs, batch))]
    assert all(size > 0 for size in taken)
    assert sum(taken) == pairs
