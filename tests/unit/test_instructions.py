"""Task files: checked when they are loaded, rendered in a sandbox."""

import pytest

from rdpo.errors import InputError
from rdpo.synthesis.instructions import (
    SHIPPED,
    check_apart,
    check_fields,
    check_turns_apart,
    check_words,
    load_task,
    render,
    turn_messages,
)

ROW = {"prompt": [{"role": "user", "content": "why?"}], "extra": '{"topic": "rain"}'}
SHIPPED_TASKS = sorted(path.name.removesuffix(".toml") for path in SHIPPED.iterdir())


@pytest.mark.parametrize("name", SHIPPED_TASKS)
def test_shipped_tasks_load_and_fit_plain_prompts(name):
    task = load_task(name)
    special = {
        "best_of": [f"response_{k}" for k in range(1, 5)],
        "counterfactual": ["control", "treatment", "negative"],
        "delta": ["strong", "weak"],
    }
    assert task.answers == special.get(name, ["response", "critique", "revision"])


def test_turns_build_their_conversations():
    task = load_task("safety")
    conversations = {}
    values = {"prompt": "why?"}
    for turn in task.turns:
        messages = turn_messages(turn, ROW, values, conversations)
        conversations[turn.name] = [*messages, {"role": "assistant", "content": turn.name}]
    assert [message["role"] for message in conversations["revision"]] == ["user", "assistant"] * 3
    assert conversations["revision"][0]["content"] == "why?"
    assert conversations["revision"][3]["content"] == "critique"


TURNS = '[[turns]]\nname = "response"\n{first}\n[[turns]]\nname = "revision"\n{second}\n'


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("", 'after = "other"', "no earlier turn"),
        ("", 'after = "response"', "needs a `user` template"),
        ("", 'after = "response"\nuser = "x"\nsystem = "y"', "begins a conversation"),
        ('user = "{{ open"', 'user = "x"', "template"),
        ("colour = 1", 'user = "x"', "unknown key"),
    ],
)
def test_wrong_tasks_are_explained(tmp_path, first, second, said):
    path = tmp_path / "task.toml"
    path.write_text('name = "t"\n' + TURNS.format(first=first, second=second))
    with pytest.raises(InputError, match=said):
        load_task(str(path))


def test_unknown_field_is_named_with_those_that_exist(tmp_path):
    path = tmp_path / "task.toml"
    path.write_text('name = "t"\n' + TURNS.format(first="", second='user = "{{ topic }} {{ mood }} {{ response }}"'))
    with pytest.raises(InputError, match="uses mood, but the prompts have only prompt, response, topic"):
        check_fields(load_task(str(path)), ROW, {})


def test_turns_that_ask_the_same_are_refused(tmp_path):
    path = tmp_path / "task.toml"
    path.write_text('name = "t"\n' + TURNS.format(first="", second='user = "{{ prompt }}{{ style }}"'))
    check_fields(load_task(str(path)), ROW, {"style": " Be brief."})
    with pytest.raises(InputError, match="ask the same"):
        check_fields(load_task(str(path)), ROW, {"style": ""})


def test_a_word_of_the_job_named_like_the_prompt_or_an_earlier_answer_is_refused(tmp_path):
    path = tmp_path / "task.toml"
    path.write_text('name = "t"\n' + TURNS.format(first="", second='user = "{{ response }}, in {{ revision }}"'))
    task = load_task(str(path))
    # The shipped counterfactual task calls its turns by its words.
    check_words(task, {"style", "revision"})
    check_words(load_task("counterfactual"), {"treatment", "negative"})
    with pytest.raises(InputError, match="turn `revision` uses `response`, which is a word of the job and an answer"):
        check_words(task, {"style", "response"})
    with pytest.raises(InputError, match=r"synthesis\.values: `prompt` is what templates know the prompt as"):
        check_words(task, {"prompt"})


def test_a_column_of_any_row_named_like_a_word_of_the_job_is_refused():
    rows = [{**ROW, "prompt_id": "a"}, {**ROW, "prompt_id": "b", "extra": '{"style": null}'}]
    check_apart({"tone"}, rows)
    check_apart({"style"}, rows[:1])
    with pytest.raises(InputError, match=r"`style` is also a column of the prompts \(row b\).*rename the word"):
        check_apart({"style"}, rows)


def with_column(name, value='"given"'):
    return {**ROW, "prompt_id": "b", "extra": f'{{"{name}": {value}}}'}


@pytest.mark.parametrize("task", SHIPPED_TASKS)
def test_a_column_named_like_a_turn_is_refused_for_every_task_that_ships(task):
    name = load_task(task).answers[0]
    rows = [{**ROW, "prompt_id": "a"}, with_column(name, "null")]
    with pytest.raises(InputError, match=rf"the answer `{name}` .* column of the prompts \(row b\).*rename the column"):
        check_turns_apart(load_task(task), rows)
    check_turns_apart(load_task(task), rows[:1])
    check_turns_apart(load_task(task), [with_column(f"{name}_of_another")])


def test_a_column_that_the_task_uses_before_its_own_answer_has_the_name_is_used_on_purpose(tmp_path):
    path = tmp_path / "task.toml"
    path.write_text('name = "t"\n' + TURNS.format(first='user = "{{ prompt }}{{ revision }}"', second='user = "x"'))
    check_turns_apart(load_task(str(path)), [with_column("revision")])
    check_turns_apart(load_task("counterfactual"), [with_column("treatment")])
    path.write_text('name = "t"\n' + TURNS.format(first='user = "{{ response }}"', second='user = "{{ response }}"'))
    with pytest.raises(
        InputError, match="turn `revision` uses `response`, which is an answer of the task and a column"
    ):
        check_turns_apart(load_task(str(path)), [with_column("response")])


def test_a_column_prompt_beside_the_column_of_the_prompts_is_refused_where_a_template_uses_the_name():
    with pytest.raises(InputError, match=r"`prompt` is also a column of the prompts \(row b\)"):
        check_turns_apart(load_task("counterfactual"), [with_column("prompt")])
    check_turns_apart(load_task("safety"), [with_column("prompt")])


def test_sandbox_refuses_python_internals():
    with pytest.raises(ValueError, match="template"):
        render("{{ x.__class__.__mro__[1].__subclasses__() }}", {"x": "a"})
    with pytest.raises(ValueError, match="missing"):
        render("{{ missing }}", {})


@pytest.mark.parametrize(
    "name", ["dropped", "prompt", "prompt_id", "question_id", "extra", "split", "source", "heldout"]
)
def test_a_turn_cannot_have_the_name_of_a_column(tmp_path, name):
    path = tmp_path / "task.toml"
    path.write_text(f'name = "t"\n[[turns]]\nname = "first"\n[[turns]]\nname = "{name}"\n', encoding="utf-8")
    with pytest.raises(InputError, match=f"`{name}` is a column"):
        load_task(str(path))


@pytest.mark.parametrize(
    "name", ["first_tokens", "first_score", "first_scores", "first_finish_reason", "best", "worst"]
)
def test_a_turn_cannot_have_a_name_that_means_something_else_beside_an_answer(tmp_path, name):
    path = tmp_path / "task.toml"
    path.write_text(f'name = "t"\n[[turns]]\nname = "first"\n[[turns]]\nname = "{name}"\n', encoding="utf-8")
    with pytest.raises(InputError, match=f"turn `{name}`: .*give the turn another name"):
        load_task(str(path))
