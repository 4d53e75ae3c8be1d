"""The ways a run can fail that are not bugs: bad input, a server that is gone, a broken promise about the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class InputError(Exception):
    """Something the user wrote or pointed at is wrong; the message says where, what and the remedy.

    The command line prints the message without a traceback and exits with code 2.
    """


class EndpointDown(RuntimeError):
    """A server answers nothing any more; the run stops, and can go on later."""


class ConservationError(RuntimeError):
    """Rows that entered a stage neither left it nor lie in its dropped table."""


def input_error_within(error: BaseException | None) -> InputError | None:
    """The bad input behind an error that a worker raised, if there is one."""
    while error is not None:
        # Errors of Ray have what a worker raised as `cause`, Python's own as `__cause__`.
        cause = getattr(error, "cause", None)
        if isinstance(error, InputError):
            return error
        if isinstance(cause, InputError):
            return cause
        error = cause if isinstance(cause, BaseException) else error.__cause__
    return None


@contextmanager
def named(setting: str) -> Iterator[None]:
    """Bad input that is found meanwhile is said in the name of a setting.

    Raises:
        InputError: with the setting before its message.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{setting}: {error}") from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean `NAME`?)` with the nearest of the known names, or nothing if none is near."""
    close = get_close_matches(name, known, n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""
