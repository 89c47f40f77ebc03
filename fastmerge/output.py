"""Standard output and error whose failures never end a run.

A character that the encoding lacks is replaced by a plain one (Θ by O, · by -, ± by ~) or by its escape. If writing fails
(`| head` has ended, the disk is full, the terminal is closed), the rest of the output is dropped.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

HANDLER = "fastmerge.plain"
# one character for one, so that columns stay aligned
LETTERS = {"Θ": "O", "·": "-", "±": "~", "–": "-", "—": "-", "…": ".", "→": ">", "×": "x", "‘": "'", "’": "'"}


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    one = UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    letter = LETTERS.get(error.object[error.start])
    return (letter, error.start + 1) if letter else codecs.backslashreplace_errors(one)


codecs.register_error(HANDLER, _plain)


def plain(text: str, encoding: str) -> str:
    """`text` as a stream of this encoding shows it."""
    return text.encode(encoding, HANDLER).decode(encoding)


class Stream:
    """A text stream that drops what cannot be written. failed: the first error, or None."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.failed: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=HANDLER)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Any) -> None:
        if self.failed is not None:
            return
        try:
            act()
        except OSError as error:
            self.failed = error
            with contextlib.suppress(OSError, ValueError):  # what is buffered must not fail again when Python ends
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    @property
    def lost(self) -> OSError | None:
        """The error where output is missing that someone waits for; None where the reader has left."""
        return None if self.failed is None or self.failed.errno == errno.EPIPE else self.failed


@contextlib.contextmanager
def guarded() -> Iterator[Stream | None]:
    """In this context `sys.stdout` and `sys.stderr` are such streams; yields the first (None where there is no stdout)."""
    before = sys.stdout, sys.stderr
    out, error = (Stream(stream) if stream is not None else None for stream in before)
    sys.stdout, sys.stderr = out, error  # type: ignore[assignment]
    try:
        yield out
    finally:
        for stream in (out, error):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
