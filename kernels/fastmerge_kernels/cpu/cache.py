"""How loops are compiled: at their first call, then cached on disk, where a folder can be written.

The cache key covers every file of the package: a loop has constants of other files in it (tile sizes, Philox purposes).
No fast-math flag is set, so NaN and inf propagate, and vector and scalar code give the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

import numba
from numba.core.caching import FunctionCache


def fingerprint(package: Path) -> str:
    """sha256 over the names and texts of all Python files of the package."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()


_SOURCES = fingerprint(Path(__file__).resolve().parent.parent)


class _Cache(FunctionCache):
    """numba's cache, but valid for the text of the whole package (numba looks at one file), and it never raises an error."""

    def __init__(self, function):
        super().__init__(function)
        # numba compares the version before it unpickles the rest, which may name classes that are gone
        self._cache_file._version = f"{numba.__version__} {_SOURCES}"

    def load_overload(self, signature, context):
        try:
            return super().load_overload(signature, context)
        except OSError:
            return None
        except Exception:  # a damaged file can raise anything while it is unpickled
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, signature, data):
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _warn_once(str(error))


_warned = False


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"fastmerge_kernels compiles its CPU loops anew in every process: {reason}", stacklevel=3)


def loop(function: Callable) -> Callable:
    """numba.njit without the GIL, cached on disk where a folder can be written."""
    dispatcher = numba.njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True)(function)
    try:
        dispatcher._cache = _Cache(function)
    except RuntimeError as error:  # numba found no folder that it may write
        _warn_once(str(error))
    return dispatcher


part = numba.njit(error_model="numpy", no_cfunc_wrapper=True, no_cpython_wrapper=True)  # called by loops, compiled once
inline = numba.njit(forceinline=True)  # for parts of a loop: LLVM vectorises only what it inlined
