"""SHA-256 of the inputs, computed by threads beside everything else: hashlib and reading release the interpreter.

This file imports no torch, so that hashing begins before torch is imported, which takes longer than to hash 2 GB.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastmerge.files.stamp import Stamp, check_stamp, gone, stamp_of

BLOCK = 1 << 24  # bytes at a time: a thread waits for the interpreter after each
MOST = 4  # threads


class Hashes:
    """Begins with `files`, each once, in their order; `add` brings more."""

    def __init__(self, files: Iterable[Path] = ()):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.pool = ThreadPoolExecutor(max(1, min(MOST, cores - 1)), thread_name_prefix="sha256")
        self.stopped = threading.Event()
        self.futures: dict[Path, Future[tuple[str, Stamp]]] = {}
        self.add(files)

    def add(self, files: Iterable[Path]) -> None:
        for file in files:
            if file not in self.futures:
                self.futures[file] = self.pool.submit(_stamped, file, self.stopped)

    def wait(self, files: Mapping[Path, Stamp]) -> dict[Path, str]:
        """The hashes of `files`, which end the work of the threads. The stamps are those of the files that were merged.

        Raises:
            UserError: a file is no longer the one that was merged.
        """
        self.add(files)
        try:
            return {file: self._hash(file, stamp) for file, stamp in files.items()}
        finally:
            self.close()

    def _hash(self, file: Path, stamp: Stamp) -> str:
        try:
            digest, before = self.futures[file].result()
        except OSError as error:
            raise gone(file, error) from None
        check_stamp(file, stamp)
        if before != stamp:  # it changed between the beginning of its hash and the merge
            digest, _ = _stamped(file)
            check_stamp(file, stamp)
        return digest

    def close(self) -> None:
        """Begin no more; a hash that is being computed is given up."""
        self.stopped.set()
        self.pool.shutdown(wait=False, cancel_futures=True)


def _stamped(path: Path, stopped: threading.Event | None = None) -> tuple[str, Stamp]:
    before = stamp_of(path)
    return sha256(path, stopped), before


def sha256(path: Path, stopped: threading.Event | None = None) -> str:
    """The hash in hexadecimal digits; an empty text if it was stopped before the end."""
    digest, buffer = hashlib.sha256(), bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if stopped is not None and stopped.is_set():
                return ""
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def likely_files(sources: Iterable[Any]) -> list[Path]:
    """The large files that the inputs probably consist of. A wrong guess costs time alone: `Hashes.wait` asks for those
    that were opened."""
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        try:
            files = [path]
            if path.is_dir():
                kinds = ("*.safetensors", "*.bin", "*/model.safetensors")
                files = next((named for kind in kinds if (named := sorted(path.glob(kind)))), [])
            found += [file for file in files if file.is_file()]
        except (OSError, ValueError):
            continue  # opening it says what is wrong
    return found
