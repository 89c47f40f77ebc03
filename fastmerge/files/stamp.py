"""How a file shows that it is still the one that was opened: its inode, size and time of the last change.

The inputs of a merge are mapped. The system kills a process that reads a mapped page which is no longer in its file (SIGBUS),
and a file that was rewritten gives a mix of two models. So the stamp is compared before every part that is read, before the
journal of the output grows, and before the output gets its name. This file imports no torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from fastmerge.errors import UserError


class Stamp(NamedTuple):
    inode: int  # another one: the file was replaced by one of the same name
    size: int
    mtime_ns: int


def stamp_of(file: Path | int) -> Stamp:
    """Of a path or a file descriptor. Raises OSError: nothing is there."""
    found = os.stat(file)
    return Stamp(found.st_ino, found.st_size, found.st_mtime_ns)


def check_stamp(path: Path, stamp: Stamp) -> None:
    """Raise UserError if `path` is no longer the file with that stamp."""
    try:
        now = stamp_of(path)
    except OSError as error:
        raise gone(path, error) from None
    if now != stamp:
        if now.size != stamp.size:
            how = f"it had {stamp.size} bytes, now it has {now.size}"
        else:
            how = "another file took its name" if now.inode != stamp.inode else "it was written to"
        raise UserError(f"{path}: changed while it was merged ({how}); {AGAIN}")


def gone(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read any more ({error.strerror or error}); {AGAIN}")


AGAIN = "merge again when it stays as it is"
