"""Rewards that come with rdpo, for `kind = "function"`.

Nothing else of rdpo is imported here: what a reward's module imports counts for the key of its stage, and a change
elsewhere would score finished runs again.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

NEEDS = 'the instructions of IFEval are verified by lm-eval; pip install "rdpo[harness]"'
NO_DATA = "NLTK's data, by which sentences and words are told apart, are missing; python -m nltk.downloader punkt_tab"


class Instructions:
    """The share of a prompt's verifiable instructions that an answer keeps, 0 to 1 (IFEval, arXiv 2311.07911).

    `"number_words"` and the like, by the names of IFEval in the prompts' column `instruction_id_list`, each with its
    arguments in `kwargs`. They are verified strictly by lm-evaluation-harness, whose code is Google's.
    """

    columns = ("instruction_id_list", "kwargs")
    """The columns that the prompts must have."""

    def check(self) -> None:
        """Look before the run whether the verifiers can be had.

        Raises:
            ImportError: lm-eval, or what its IFEval needs, is not installed.
        """
        _verifiers()

    def __call__(self, prompt: Sequence[dict[str, str]], answer: str, row: dict[str, Any]) -> float:
        """The share that an answer keeps.

        Raises:
            ValueError: the row has no instructions, unknown ones, not all that they need, or one that takes data which
                are not on this machine.
        """
        verifiers = _verifiers()
        names, arguments = _asked(row)
        for name, given in zip(names, arguments, strict=True):
            _check_asked(verifiers, name, given)
        asked = verifiers.InputExample(key=0, instruction_id_list=names, prompt=_question(prompt), kwargs=arguments)
        try:
            kept = verifiers.test_instruction_following_strict(asked, answer).follow_instruction_list
        except LookupError:
            raise ValueError(NO_DATA) from None
        return float(sum(kept) / len(kept))


instructions = Instructions()


@lru_cache(maxsize=1)
def _verifiers() -> Any:
    try:
        import langdetect
        from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise ImportError(f"{NEEDS} ({error})") from None
    # It draws at random; the same text is to be of the same language each time.
    langdetect.DetectorFactory.seed = 0
    return utils


def _asked(row: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Names and arguments of a row's instructions."""
    columns = json.loads(row.get("extra") or "{}")
    names, arguments = (_list_in(columns.get(column), column) for column in Instructions.columns)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError("instruction_id_list is not a list of names")
    if len(arguments) != len(names):
        raise ValueError(f"kwargs has {len(arguments)} entries for {len(names)} instructions")
    # A table of rows has every argument in all of them, null where it is another instruction's.
    given = [{key: value for key, value in (one or {}).items() if value is not None} for one in arguments]
    return names, given


def _list_in(value: Any, column: str) -> list[Any]:
    """A column's list; a table of text alone, as CSV is, holds it as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list):
        raise ValueError(f"{column} is not a list")
    if column == "kwargs" and not all(one is None or isinstance(one, dict) for one in value):
        raise ValueError("kwargs is not a list of tables")
    return value


def _check_asked(verifiers: Any, name: str, given: dict[str, Any]) -> None:
    """Look whether an instruction is known and says all: lm-eval would draw at random what is left out.

    Raises:
        ValueError: it is not, or does not.
    """
    known = verifiers.instructions_registry.INSTRUCTION_DICT
    if name not in known:
        raise ValueError(f"{name} is no instruction of IFEval")
    needed = known[name](name).get_instruction_args_keys()
    if missing := [key for key in needed if not given.get(key)]:
        raise ValueError(f"{name} lacks {', '.join(missing)} in kwargs")
    if unknown := given.keys() - set(needed):
        raise ValueError(f"{name} does not take {', '.join(sorted(unknown))}")


def _question(prompt: Sequence[dict[str, str]]) -> str:
    return next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")
