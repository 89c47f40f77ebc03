"""The output: safetensors files under their final headers, filled in place, and nothing at the target before all is written.

Everything happens in the folder TARGET.part: the files in TARGET.part/out get their final size (so a full disk is told
at once), the tensors are written into the mapped files, and a journal lists the tensors that reached the disk, which a
thread waits for. A second start with the same plan goes on behind them, unless an input is in memory. At the end the files
are flushed and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmerge.errors import UserError
from fastmerge.files.headers import NAMES, drop_pages
from fastmerge.files.plan import Item, Plan

JOURNAL, PLAN, LOCK = "merge.journal", "merge.plan", "merge.lock"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLUSH = 64 << 20  # bytes between two entries in the journal
BESIDE = (  # what a folder of weights needs to be loaded
    "config.json",
    "generation_config.json",
    "merges.txt",
    "open_clip_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


class Output:
    """Files that are being written. One process at a time; `with` unmaps them, and after an error of the user deletes
    them."""

    def __init__(self, target: Path, plan: Plan, metadata: dict[str, str], identity: str | None):
        """identity: what must be equal for a second start to go on; None: it never does.

        Raises:
            UserError: the target exists, cannot be written, or another process writes it.
        """
        self.plan = plan
        self.target, self.work = target, target.with_name(target.name + ".part")
        self.files = self.work / "out"
        self.maps: dict[str, mmap.mmap] = {}
        self.handles: list[Any] = []
        self.disk = ThreadPoolExecutor(1, thread_name_prefix="fsync")
        self.saves: list[Future[None]] = []
        self.places: dict[str, tuple[str, int]] = {}
        self.done: dict[str, dict[str, Any]] = {}
        self.waiting: list[dict[str, Any]] = []
        self.unsaved = 0
        check_target(target)
        self.single = target.suffix == ".safetensors"
        layout = files_of(plan, target.name if self.single else None)
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            left = [path.name for path in self.work.iterdir()]
            if left and LOCK not in left:
                raise UserError(f"{self.work} is in the way and holds {left[0]}; choose another --out, or delete it")
            self.lock = open(self.work / LOCK, "w")  # noqa: SIM115 (kept until the end)
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"--out {target}: another process writes it; wait for it") from None
            self.resumed = self._resume(identity)
            for file, items in layout.items():
                self._create(file, items, metadata)
            self.journal = open(self.work / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115
            if len(layout) > 1:
                self._index(layout, plan)
        except OSError as error:
            if hasattr(self, "lock"):
                self._close()
                shutil.rmtree(self.work, ignore_errors=True)
            raise UserError(
                f"--out {target}: cannot write there ({error.strerror or error}); nothing was written"
            ) from None

    def _resume(self, identity: str | None) -> bool:
        """Whether an earlier start left part of this output; what another plan left is deleted."""
        plan, journal = self.work / PLAN, self.work / JOURNAL
        if identity is not None and plan.is_file() and plan.read_text(encoding="utf-8") == identity:
            with contextlib.suppress(FileNotFoundError):
                for line in journal.read_text(encoding="utf-8").splitlines():
                    with contextlib.suppress(ValueError):  # a line that was cut off
                        entry = json.loads(line)
                        self.done[entry["name"]] = entry
            return True
        plan.unlink(missing_ok=True)
        shutil.rmtree(self.files, ignore_errors=True)
        self.files.mkdir()
        journal.unlink(missing_ok=True)
        if identity is not None:
            plan.write_text(identity, encoding="utf-8")
        return False

    def _create(self, file: str, items: list[Item], metadata: dict[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": metadata}
        offset = 0
        for item in items:
            stop = offset + item.nbytes
            header[item.name] = {"dtype": NAMES[item.dtype], "shape": list(item.shape), "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start, path = 8 + len(text), self.files / file
        head = len(text).to_bytes(8, "little") + text
        whole = self.resumed and path.is_file() and path.stat().st_size == start + offset
        handle = open(path, "r+b" if whole else "w+b")  # noqa: SIM115 (kept until the end)
        self.handles.append(handle)
        if not whole or handle.read(start) != head:
            for item in items:
                self.done.pop(item.name, None)
            _reserve(handle.fileno(), start + offset)
            handle.seek(0)
            handle.write(head)
            handle.flush()
        self.maps[file] = mmap.mmap(handle.fileno(), start + offset)
        for item in items:
            self.places[item.name] = file, start + header[item.name]["data_offsets"][0]

    def _index(self, layout: dict[str, list[Item]], plan: Plan) -> None:
        places = {item.name: file for file, items in layout.items() for item in items}
        about = {
            "metadata": {"total_size": sum(item.nbytes for item in plan.items)},
            "weight_map": dict(sorted(places.items())),
        }
        (self.files / INDEX).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def tensor(self, item: Item) -> Tensor:
        """The entries of a tensor in the file, 1-D, to be written."""
        file, offset = self.places[item.name]
        if not item.numel:
            return torch.empty(0, dtype=item.dtype)
        return torch.frombuffer(self.maps[file], dtype=torch.uint8, count=item.nbytes, offset=offset).view(item.dtype)

    def written(self, item: Item, start: int, stop: int) -> None:
        """The pages leave the memory of the process, not the cache of the system."""
        file, offset = self.places[item.name]
        width = item.dtype.itemsize
        drop_pages(self.maps[file], offset + start * width, offset + stop * width)

    def finished(self, item: Item, about: dict[str, Any]) -> None:
        """Note that a tensor is written."""
        self.waiting.append({"name": item.name, **about})
        self.unsaved += item.nbytes
        if self.unsaved >= FLUSH:
            self.plan.check_unchanged()  # what the journal names was made from the inputs as they were opened
            self._save_later()

    def _save_later(self) -> None:
        self.saves.append(self.disk.submit(self.save, self.waiting))
        self.waiting, self.unsaved = [], 0

    def save(self, entries: list[dict[str, Any]]) -> None:
        """Bring what is written to the disk, then `entries` into the journal. In a thread: a flush of the mapped memory
        would keep the interpreter, fsync does not."""
        for handle in self.handles:
            os.fsync(handle.fileno())
        self.journal.write("".join(json.dumps(entry) + "\n" for entry in entries))
        self.journal.flush()
        os.fsync(self.journal.fileno())

    def finish(self, replaced: dict[str, str], folder: Path | None) -> None:
        """Fill in what the headers could not know (texts of the same length), flush, and rename to the target.

        folder: the small files that a loader needs are copied from there.
        """
        try:
            self._save_later()
            for save in self.saves:
                save.result()
            for data in self.maps.values():
                stop = 8 + int.from_bytes(data[:8], "little")
                header = data[8:stop]
                for old, new in replaced.items():
                    header = header.replace(old.encode(), new.encode())
                data[8:stop] = header
                data.flush()
            self._close()
            if self.single:
                _sync(self.files / self.target.name)
                os.replace(self.files / self.target.name, self.target)
            else:
                for name in BESIDE:
                    if folder is not None and (folder / name).is_file():
                        shutil.copyfile(folder / name, self.files / name)
                for path in [*self.files.iterdir(), self.files]:
                    _sync(path)
                os.rename(self.files, self.target)
            shutil.rmtree(self.work, ignore_errors=True)
            _sync(self.target.parent)
        except OSError as error:
            raise UserError(
                f"--out {self.target}: cannot be finished ({error}); its parts are in {self.work}"
            ) from None

    def delete(self) -> None:
        """Give up: leave nothing."""
        self._close()
        shutil.rmtree(self.work, ignore_errors=True)

    def _close(self) -> None:
        self.disk.shutdown(cancel_futures=True)
        for data in self.maps.values():
            with contextlib.suppress(BufferError):  # a tensor may still look at it; it is unmapped with the last one
                data.close()
        for handle in self.handles:
            handle.close()
        for name in ("journal", "lock"):
            if hasattr(self, name):
                getattr(self, name).close()


def check_target(target: Path) -> None:
    """Raise UserError if there is something at the target already, or never can be."""
    try:
        there = os.path.lexists(target)
    except ValueError as error:
        raise UserError(f"--out {target}: cannot be the name of a file ({error})") from None
    if there:
        raise UserError(f"--out {target}: exists already; choose another name, or delete it")


def files_of(plan: Plan, single: str | None) -> dict[str, list[Item]]:
    """The tensors of every file, wide types first so that every tensor is aligned, then by name."""

    def order(items: list[Item]) -> list[Item]:
        return sorted(items, key=lambda item: (-item.dtype.itemsize, item.name))

    if single:
        if plan.options.shard is not None:
            raise UserError("--shard needs a folder: give --out a name that does not end in .safetensors")
        return {single: order(plan.items)}
    groups: list[list[Item]] = [[]]
    if plan.options.shard is not None:
        for item in plan.items:
            if groups[-1] and sum(i.nbytes for i in groups[-1]) + item.nbytes > plan.options.shard:
                groups.append([])
            groups[-1].append(item)
    elif plan.shards:
        files = sorted(set(plan.shards.values()))
        groups = [[i for i in plan.items if plan.shards.get(i.name, files[-1]) == file] for file in files]
        groups = [group for group in groups if group]
    else:
        groups = [plan.items]
    if len(groups) == 1:
        return {SINGLE: order(groups[0])}
    return {f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors": order(group) for k, group in enumerate(groups)}


def _reserve(handle: int, count: int) -> None:
    """Give a file its size on the disk; raises OSError where there is no room."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, count)
        return
    for start in range(0, count, 1 << 24):
        os.pwrite(handle, bytes(min(1 << 24, count - start)), start)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
