"""A first job file out of a few answers, each checked as far as it can be without loading a model."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.markup import escape
from rich.prompt import Prompt
from rich.text import Text

from rdpo.config import job_of
from rdpo.errors import InputError, did_you_mean, named
from rdpo.modeling.weights import check_model_name
from rdpo.preference.rewards.function import load_function
from rdpo.records import SIDES, Row, visible
from rdpo.synthesis.columns import columns_of
from rdpo.synthesis.conversation import is_prompt
from rdpo.synthesis.instructions import load_task
from rdpo.synthesis.sources import first_rows, source_files

Answers = dict[str, str]
FUNCTION = re.compile(r"[\w.]+:\w+")
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
USUAL_COLUMNS = ("prompt", "question", "instruction", "messages", "query", "input", "text")
SAME, JUDGE = "same", "judge"
MOST_TRIES = 3
"""How often an answer is asked for that will not do."""
RUBRIC = """{{ prompt }}

Answer: {{ answer }}

How good is this answer? Rate it from 1 (bad) to 5 (good)."""


@dataclass(frozen=True)
class Question:
    """One question: `check` refuses an answer by an `InputError`, `default` and `applies` see the answers before it."""

    name: str
    text: str
    check: Callable[[str, Answers], object]
    default: Callable[[Answers], str | None] = lambda answers: None
    applies: Callable[[Answers], bool] = lambda answers: True


def write_job(path: Path, given: Mapping[str, str | None], yes: bool) -> list[str]:
    """Ask what is not given, and write a job file; what to do next, as lines of text.

    Args:
        path: the file to write.
        given: answers by the names of their questions; None is asked.
        yes: take the defaults in place of asking.

    Raises:
        InputError: the file exists or cannot be written, or an answer is missing or wrong.
    """
    if path.exists():
        raise InputError(f"{path}: exists; choose another name, or remove it")

    content = job_text(path.stem, given, yes)
    # Read back before it is written: what `init` writes, `run` takes.
    job_of(tomllib.loads(content), str(path))
    try:
        # Never over a file that has come there in the meantime.
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    name = shlex.quote(str(path))
    commands = {
        f"rdpo plan {name}": "memory of the training, before anything runs",
        f"rdpo run {name} --dry-run": "the whole job, and which stages would run",
        f"rdpo run {name}": "from prompts to the published model",
    }
    width = max(map(len, commands)) + 2
    return [f"{path} is written. Next:", *(f"  {command:<{width}}{what}" for command, what in commands.items())]


def job_text(name: str, given: Mapping[str, str | None], yes: bool) -> str:
    """A job of this name as TOML, out of the answers that are given and of those that are asked for.

    Raises:
        InputError: an answer is missing or wrong.
    """
    answers: Answers = {}
    for question in QUESTIONS:
        if question.applies(answers):
            answers[question.name] = _answer(question, given.get(question.name), yes, answers)
    return _filled(name, answers)


def _answer(question: Question, given: str | None, yes: bool, answers: Answers) -> str:
    if given is None and yes:
        given = question.default(answers)
    if given is not None:
        question.check(given, answers)
        return given
    if yes:
        raise InputError(f"--{question.name}: has no default; give it")
    return _asked(question, question.default(answers), answers)


def _asked(question: Question, default: str | None, answers: Answers) -> str:
    """The answer to a question, which is asked until there is one that will do."""
    console = Console()
    suggested: Any = ... if default is None else default
    for left in reversed(range(MOST_TRIES)):
        try:
            answer = Prompt.ask(escape(question.text), console=console, default=suggested)
            # Answers out of a file or pipe stand in the transcript as if they were typed.
            if not sys.stdin.isatty():
                console.print(Text(visible(answer)))
            question.check(answer.strip(), answers)
            return answer.strip()
        except EOFError:
            raise InputError(f"the answers end before --{question.name}") from None
        except InputError as error:
            if not left:
                said = str(error).removeprefix(f"--{question.name}: ")
                raise InputError(f"--{question.name}: {said}; asked {MOST_TRIES} times") from None
            console.print(Text(visible(str(error)), style="red"))
    raise AssertionError("the last try returns or raises")


def _check_source(answer: str, answers: Answers) -> None:
    # The hub is not asked: it may want a token, and a large data set takes minutes.
    if answer.startswith("hf:"):
        return
    _first_rows(answer or ".")


def _first_rows(source: str) -> list[Row]:
    with named("--prompts"):
        return first_rows(source_files(source)[0])


def _row(answers: Answers) -> Row:
    """A value of each column of the source; none of a data set of the hub, which is not asked now."""
    source = answers["prompts"]
    if source.startswith("hf:"):
        return {}
    rows = _first_rows(source)
    return {name: _first_value(name, rows) for name in columns_of(rows)}


def _first_value(column: str, rows: Sequence[Row]) -> object:
    return next(row[column] for row in rows if column in row)


def _check_column(answer: str, answers: Answers) -> None:
    columns = list(_row(answers))
    if columns and answer not in columns:
        raise InputError(f"no column `{answer}`{did_you_mean(answer, columns)}; there are {', '.join(columns)}")


def _column(answers: Answers) -> str:
    """The column that most likely holds the prompt."""
    row = _row(answers)
    readable = [name for name, value in row.items() if is_prompt(value)]
    return next((name for name in [*USUAL_COLUMNS, *readable] if name in row), USUAL_COLUMNS[0])


def _has_pairs(answers: Answers) -> bool:
    return set(SIDES) <= set(_row(answers))


def _check_yes_or_no(answer: str, answers: Answers) -> None:
    if answer not in ("yes", "no"):
        raise InputError("answer yes or no")


def _synthesises(answers: Answers) -> bool:
    return answers.get("pairs") != "yes"


def _check_teacher(answer: str, answers: Answers) -> None:
    if answer != SAME:
        check_model_name(answer)


def _check_reward(answer: str, answers: Answers) -> None:
    if FUNCTION.fullmatch(answer):
        load_function(answer)
    elif answer != JUDGE:
        check_model_name(answer)


def _check_number(answer: str, answers: Answers) -> None:
    if not (answer.isascii() and answer.isdigit()):
        raise InputError("answer with a number, 0 for none")


def gpus_here(answers: Answers | None = None) -> str:
    """How many GPUs this machine has."""
    import torch

    return str(torch.cuda.device_count())


QUESTIONS = (
    Question("prompts", "Prompts: a JSONL, Parquet or CSV file or folder, or hf:DATASET", _check_source),
    Question("column", "Column with the prompt", _check_column, _column),
    Question(
        "pairs",
        "It has `chosen` and `rejected`. Train on these pairs as they are? (yes, no)",
        _check_yes_or_no,
        lambda answers: "yes",
        _has_pairs,
    ),
    Question(
        "student",
        "Student, the model to align: a hub id (owner/name), folder or .gguf file",
        lambda answer, answers: check_model_name(answer),
    ),
    Question(
        "task",
        "Task: safety, sycophancy, roleplay, or a task file of your own",
        lambda answer, answers: load_task(answer),
        lambda answers: "sycophancy",
        _synthesises,
    ),
    Question(
        "teacher",
        "Teacher: a model, or `same` for the student itself",
        _check_teacher,
        lambda answers: SAME,
        _synthesises,
    ),
    Question(
        "reward",
        "Reward: a reward model, a function (module:name), or `judge` for a rating by the teacher",
        _check_reward,
        lambda answers: JUDGE,
        _synthesises,
    ),
    Question("gpus", "GPUs", _check_number, gpus_here),
)


def _filled(name: str, answers: Answers) -> str:
    environment = Environment(trim_blocks=True, undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    environment.filters["toml"] = _toml
    template = environment.from_string((files("rdpo.cli") / "init.toml.jinja").read_text(encoding="utf-8"))
    turns = load_task(answers["task"]).answers if "task" in answers else [""]
    teacher = answers.get("teacher", SAME)

    return template.render(
        name=NOT_IN_NAMES.sub("-", name).strip("-._") or "job",
        student=answers["student"],
        prompts=answers["prompts"],
        column=answers["column"],
        task=answers.get("task"),
        teacher=None if teacher == SAME else teacher,
        rewards=[reward_table(answers["reward"], None if teacher == SAME else teacher)] if "reward" in answers else [],
        chosen=turns[-1],
        rejected=turns[0],
        gpus=int(answers["gpus"]),
    )


def _toml(value: str) -> str:
    # It writes whole tables alone, so the value is cut out of one.
    return tomli_w.dumps({"_": value}, multiline_strings=True).removeprefix("_ = ").rstrip("\n")


def reward_table(answer: str, teacher: str | None = None, on_gpu: bool = False) -> dict[str, Any]:
    """The settings of a reward: a reward model, a function, or a judge; this is the teacher, or else the student."""
    if answer == JUDGE:
        model = {"model": teacher} if teacher else {}
        engine = {"engine": {"gpus": 1}} if on_gpu else {}
        return {"kind": "judge", "name": "judge", **model, "rubric": RUBRIC, "prefill": "Rating: ", **engine}
    if FUNCTION.fullmatch(answer):
        name = answer.rpartition(":")[2].lower().lstrip("_0123456789")
        return {"kind": "function", "name": name or "function", "function": answer}
    return {"kind": "classifier", "name": "quality", "model": answer, **({"gpus": 1} if on_gpu else {})}
