"""Data that is still packed: what unpacks it. Nothing is unpacked here, since a user's folders are never written to."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable

TAR, SEVEN = "tar -xf {file} -C {to}", "7z x {file} -o{to}"
COMMANDS = {".zip": "unzip -d {to} {file}", ".7z": SEVEN, ".rar": SEVEN} | dict.fromkeys(
    (".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz", ".tar.zst"), TAR
)


def archives(paths: Iterable[str]) -> str:
    """A line with the command that unpacks it for every archive that is one of `paths` or in one of these folders."""
    files = []
    for path in dict.fromkeys(paths):
        files += [path] if os.path.isfile(path) else []
        if os.path.isdir(path):
            files += [os.path.join(path, name) for name in sorted(os.listdir(path)) if not name.startswith(".")]
    lines = []
    for file in files:
        command = next((command for suffix, command in COMMANDS.items() if file.lower().endswith(suffix)), None)
        if command and os.path.isfile(file):
            to = shlex.quote(os.path.dirname(file) or ".")
            command = command.format(file=shlex.quote(file), to=to)
            lines.append(f"\n{os.path.basename(file)} is still packed. Unpack it: {command}")
    return "".join(lines[:5])
