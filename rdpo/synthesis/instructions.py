"""Task files: the wording of the teacher's turns is data, not code.

A task is a TOML file with a list of `[[turns]]`. A turn either begins a conversation or continues
one, `after` an earlier turn; its `user` template may use `prompt`, the answers of earlier turns by name,
and the other columns of the prompt's row. A turn with `samples = 4` is spoken four times, as NAME_1 to
NAME_4. Templates are rendered in a sandbox.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import ValidationError

from rdpo.config import BEST, WORST, check_kind, tables_of
from rdpo.config.task import Task, Turn
from rdpo.errors import InputError, did_you_mean
from rdpo.records import DRAWN, HELDOUT, ID_COLUMN, QUESTION, VOICE, Messages, Row, extra_of, text_of

COLUMNS = {"source", "line", "prompt", ID_COLUMN, QUESTION, "prompt_length", "split", "extra", "dropped", HELDOUT}
"""Columns that rows have before the first turn, or get for the pairs; a turn of that name would overwrite one."""
BESIDE_ANSWERS = (
    *("_finish_reason", "_tokens", "_prompt_length", "_prompt_cached", "_scores", "_score", "_reasoning"),
    *(VOICE, DRAWN),
)
"""How the names of columns end that stand beside each answer."""
SHIPPED = files("rdpo.synthesis") / "tasks"
_SANDBOX = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)


def load_task(source: str) -> Task:
    """Read a task file, or one that ships with rdpo by its bare name.

    Raises:
        InputError: no such file, wrong keys, a turn that continues none, a broken template.
    """
    shipped = SHIPPED / f"{source}.toml"
    path = shipped if source.isidentifier() and shipped.is_file() else Path(source)
    try:
        content = tables_of(path.read_text(encoding="utf-8"), path.name)
    except FileNotFoundError:
        names = ", ".join(sorted(one.name.removesuffix(".toml") for one in SHIPPED.iterdir()))
        looked = f"looked in {Path.cwd()}"
        raise InputError(
            f"synthesis.task: {source}: no such file ({looked}); the tasks that come with rdpo are {names}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"synthesis.task: {source}: {error}") from None
    check_kind(content, "task", f"synthesis.task: {source}")
    try:
        task = Task.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            meant = did_you_mean(str(first["loc"][-1]), [*Turn.model_fields, *Task.model_fields])
            raise InputError(f"synthesis.task: {source}: {field}: unknown key{meant}") from None
        raise InputError(f"synthesis.task: {source}: {field}: {first['msg']}") from None
    _check_turns(task, source)
    return task


def _check_turns(task: Task, source: str) -> None:
    if len(task.answers) < 2:
        raise InputError(f"synthesis.task: {source}: one answer makes no pair; add a turn or `samples`")
    earlier: list[str] = []
    for turn in task.turns:
        where = f"synthesis.task: {source}: turn `{turn.name}`"
        _check_name(turn, where)
        if set(turn.names) & set(earlier):
            raise InputError(f"{where} has the name of an earlier one; give each turn its own name")
        if turn.after is not None and turn.after not in earlier:
            raise InputError(f"{where}: after = {turn.after!r} is no earlier turn")
        if turn.after is not None and turn.user is None:
            raise InputError(f"{where} continues {turn.after!r}, so it needs a `user` template")
        if turn.after is not None and turn.system is not None:
            raise InputError(f"{where}: only a turn that begins a conversation can have `system`")
        _check_words_from_elsewhere(turn, earlier, where)
        for template in _templates(turn):
            check_template(template, where)
        earlier.extend(turn.names)


def _check_words_from_elsewhere(turn: Turn, earlier: Collection[str], where: str) -> None:
    if turn.rewrites is not None and turn.rewrites not in earlier:
        raise InputError(f"{where}: rewrites = {turn.rewrites!r} is no earlier answer")
    if (turn.rewrites or turn.given is not None) and turn.prefill:
        raise InputError(f"{where}: its first words are another answer's; remove `prefill`")
    if turn.given is not None and (turn.rewrites or turn.samples > 1):
        raise InputError(f"{where}: its answer is given; remove `rewrites` and `samples`")


def _templates(turn: Turn) -> list[str]:
    """The templates of a turn."""
    return [template or "" for template in (turn.system, turn.user, turn.prefill, turn.given)]


def _check_name(turn: Turn, where: str) -> None:
    why = None
    if taken := set(turn.names) & COLUMNS:
        why = f"`{min(taken)}` is a column of rdpo's own"
    elif turn.name in (BEST, WORST):
        why = f"`pairs.chosen` and `pairs.rejected` know the {turn.name} of several samples by this name"
    elif turn.name.endswith(BESIDE_ANSWERS):
        why = "columns beside an answer have such names"
    if why:
        raise InputError(f"{where}: {why}; give the turn another name")


def check_template(template: str, where: str) -> set[str]:
    """The names a template uses.

    Raises:
        InputError: it is not a valid template.
    """
    try:
        return meta.find_undeclared_variables(_SANDBOX.parse(template))
    except TemplateSyntaxError as error:
        raise InputError(f"{where}: template: {error.message} (line {error.lineno})") from None
    except RecursionError:
        raise InputError(f"{where}: template: too deeply nested") from None


def check_spoken_alone(task: Task) -> None:
    """Check that no turn takes words of its answer from elsewhere, where reasoning would stand before them.

    Raises:
        InputError: a turn does.
    """
    for turn in task.turns:
        if turn.rewrites or turn.given is not None:
            how = "rewrites an answer" if turn.rewrites else "has a given answer"
            raise InputError(
                f"synthesis.task: turn `{turn.name}` {how}, before which nothing was thought; set synthesis.reasoning "
                'to "off"'
            )


def check_prefills(turns: Iterable[Turn]) -> None:
    """Check that no turn puts words into the mouth of a server, which may not continue them.

    Raises:
        InputError: a turn does.
    """
    for turn in turns:
        if turn.prefill:
            raise InputError(f"synthesis.task: turn `{turn.name}` has a `prefill`, which an endpoint cannot go on from")
        if turn.rewrites:
            raise InputError(f"synthesis.task: turn `{turn.name}` rewrites an answer, which an endpoint cannot")


def check_fields(task: Task, row: Row, words: Mapping[str, str]) -> None:
    """Check the templates against the columns of the data and the job's words, on one row.

    Raises:
        InputError: a template uses a name that is neither a column, a word of the job nor an earlier turn, or two
            turns ask the same.
    """
    known = {"prompt", *extra_of(row), *words}
    for turn in task.turns:
        for template in _templates(turn):
            unknown = check_template(template, f"turn `{turn.name}`") - known
            if unknown:
                raise InputError(
                    f"synthesis.task: turn `{turn.name}` uses {', '.join(sorted(unknown))}, but the "
                    f"prompts have only {', '.join(sorted(known))}"
                )
        known.update(turn.names)
    _check_different(task, row, words)


def check_words(task: Task, words: Collection[str]) -> None:
    """Check that no template uses a word of the job by a name that it knows as something else.

    A word may be named like a turn, as long as no later turn uses it: the answer has the name from then on.

    Raises:
        InputError: a word is named like the prompt, or like an answer where a template uses it.
    """
    if "prompt" in words:
        raise InputError("synthesis.values: `prompt` is what templates know the prompt as; give the word another name")
    answered: set[str] = set()
    for turn in task.turns:
        used = names_used(turn)
        if taken := used & answered & set(words):
            name = min(taken)
            raise InputError(
                f"synthesis.values: turn `{turn.name}` uses `{name}`, which is a word of the job and an answer of the "
                "task; give the word another name"
            )
        answered.update(turn.names)


def names_used(turn: Turn) -> set[str]:
    """The names that a turn uses: those in its templates, and the answer that it rewrites."""
    where = f"synthesis.task: turn `{turn.name}`"
    used = {name for text in _templates(turn) for name in check_template(text, where)}
    return used | {turn.rewrites} if turn.rewrites else used


def check_apart(words: Collection[str], rows: Iterable[Row]) -> None:
    """Check that no row of the prompts has a column named like a word of the job: a template could mean either.

    Raises:
        InputError: one has.
    """
    for row in rows:
        if shared := extra_of(row).keys() & words:
            name = min(shared)
            raise InputError(
                f"synthesis.values: `{name}` is also a column of the prompts (row {row[ID_COLUMN]}), and a template "
                "could mean either; rename the word in the job and the task, or the column"
            )


def check_turns_apart(task: Task, rows: Iterable[Row]) -> None:
    """Check that no row of the prompts has a column whose name an answer of the task takes, or the prompt.

    A task uses such a column on purpose where templates need it before the answer has the name, and none does later.

    Raises:
        InputError: a row has such a column, which would be left aside without a word, or could be meant by a template.
    """
    refused = _taken_names(task)
    for row in rows:
        for name in extra_of(row).keys() & refused.keys():
            raise InputError(
                f"synthesis.task: {refused[name]} a column of the prompts (row {row[ID_COLUMN]}); rename the column, "
                "or the turn in a task file of your own"
            )


def _taken_names(task: Task) -> dict[str, str]:
    """The names that no column of the prompts may have, each with the beginning of the message that says why."""
    used_in: dict[str, list[str]] = {}
    answered: dict[str, str] = {}
    taken: dict[str, str] = {}
    for turn in task.turns:
        used = names_used(turn)
        for name in used & answered.keys():
            taken[name] = f"turn `{turn.name}` uses `{name}`, which is an answer of the task and"
        for name in used:
            used_in.setdefault(name, []).append(turn.name)
        for name in turn.names:
            answered[name] = turn.name
            if name not in used_in:
                taken[name] = f"the answer `{name}` of turn `{turn.name}` has the name of"

    if "prompt" in used_in:
        taken["prompt"] = (
            f"turn `{used_in['prompt'][0]}` uses `prompt`, which is the text of the prompt: `prompt` is also"
        )
    return taken


def _check_different(task: Task, row: Row, words: Mapping[str, str]) -> None:
    # Two turns that ask the same, in the same way, make pairs that differ by chance alone.
    asked: dict[str, str] = {}
    for turn in task.turns:
        used = check_template((turn.user or "") + turn.prefill, turn.name)
        apart = turn.after is not None or turn.rewrites or turn.given is not None
        if not apart and not used & set(task.answers):
            prefill = rendered_prefill(turn, template_values(row, words))
            question = str((question_of(turn, row, words), prefill, turn.temperature, turn.top_p, turn.voice))
            if question in asked:
                raise InputError(
                    f"synthesis.task: turns `{asked[question]}` and `{turn.name}` ask the same; give them different "
                    "words, or one of them `samples`"
                )
            asked[question] = turn.name


def beginning(task: Task, name: str, where: str = "condition") -> Turn:
    """The turn of this name that begins a conversation.

    Raises:
        InputError: there is none.
    """
    begins = {turn.name: turn for turn in task.turns if turn.after is None}
    if name not in begins:
        raise InputError(f"{where}: {name!r} is no turn that begins a conversation; those are {', '.join(begins)}")
    return begins[name]


def question_of(turn: Turn, row: Row, words: Mapping[str, str]) -> Messages:
    """What a turn that begins a conversation asks."""
    return turn_messages(turn, row, template_values(row, words), {})


@lru_cache(maxsize=256)
def _compiled(template: str) -> Template:
    return _SANDBOX.from_string(template)


def render(template: str, values: Mapping[str, object]) -> str:
    """The template filled in, in the sandbox.

    Raises:
        ValueError: a name is missing or the template does what the sandbox forbids.
    """
    try:
        return str(_compiled(template).render(values))
    except Exception as error:
        # A template can call any method of a string, so any error can come of it.
        raise ValueError(f"template: {error}") from None


def rendered_prefill(turn: Turn, values: Mapping[str, object]) -> str:
    """The words that a turn's answer begins with.

    Raises:
        ValueError: a name is missing or the template does what the sandbox forbids.
    """
    # Jinja takes one line break from the end of a template; here it may be what an answer is to continue.
    return render(turn.prefill, values) + ("\n" if turn.prefill.endswith("\n") else "")


def given_answer(turn: Turn, values: Mapping[str, object]) -> str:
    """The answer that a turn has without being spoken.

    Raises:
        ValueError: a name is missing or the template does what the sandbox forbids.
    """
    return render(turn.given or "", values)


def template_values(row: Row, words: Mapping[str, str]) -> dict[str, Any]:
    """What templates may use before the first turn: the job's words, the row's other columns, its prompt."""
    return {**words, **extra_of(row), "prompt": text_of(row["prompt"])}


def turn_messages(
    turn: Turn, row: Row, values: Mapping[str, object], conversations: Mapping[str, Messages]
) -> Messages:
    """The conversation that a turn answers; `conversations` are those of earlier turns, answers included."""
    if turn.after is not None:
        return [*conversations[turn.after], {"role": "user", "content": render(turn.user or "", values)}]
    if turn.user is not None:
        begun = [{"role": "user", "content": render(turn.user, values)}]
    else:
        begun = [message for message in row["prompt"] if turn.system is None or message["role"] != "system"]
    if turn.system is None:
        return begun
    return [{"role": "system", "content": render(turn.system, values)}, *begun]
