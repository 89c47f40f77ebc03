"""Errors that a user can fix. The command line prints them without a traceback and exits with code 2."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """The message names the problem, what was expected, and what to do."""


class Unprepared(UserError):
    """Data or weights of a command are missing, or do not fit its settings; nothing was trained."""


class Busy(UserError):
    """Other processes work on all that the command should do."""


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """A UserError inside becomes an `Unprepared`."""
    try:
        yield
    except UserError as error:
        raise Unprepared(str(error)) from None


def nearest(name: str, options: Iterable[str]) -> str:
    """`" Did you mean: a, b?"` with the closest of `options`, or `""` where nothing is close or `name` is one of them."""
    options = list(options)
    if name in options:
        return ""
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return f" Did you mean: {', '.join(by_lower[c] for c in close)}?" if close else ""


def first_line(error: Exception) -> str:
    """The first line of the error's message, or its type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
