"""OPCM and KnOTS-TIES on files: rules that must see all tensors before they write one.

They go through the tensors twice. The first time they decompose every matrix, and keep what they found in a scratch file in
the folder for temporary files (TMPDIR), so that memory stays that of one tensor: OPCM the merged task vector (4 bytes per
entry), KnOTS every task vector in the common basis and the basis (about T + 1 times that).

OPCM divides by lam_t = ||total_t|| / mean_i ||delta_i|| after every model, a norm of the whole model. Its projections do not
depend on that factor: total_t = lam_t tau_t follows total_t = total_{t-1} + P(delta_t), tensor by tensor, and one division at
the end is enough. A tensor with NaN or inf counts in no norm.

A matrix with NaN or inf has no decomposition: the survey leaves it out, and it becomes NaN.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.errors import UserError
from fastmerge.files.rule import FileRule, Part, Whole, not_finite
from fastmerge.files.thresholds import Parts, Trim, trims
from fastmerge.merging.knots import Knots, common
from fastmerge.merging.opcm import OPCM, projected
from fastmerge.merging.spectral import NotFinite
from fastmerge.merging.ties import divided


class Scratch:
    """A file without a name that holds fp32 tensors; it goes away with the last of them."""

    def __init__(self, entries: int):
        """Raises UserError: there is no room for that many entries."""
        with tempfile.TemporaryFile() as file:
            size = max(4, 4 * entries)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
            except OSError as error:
                raise UserError(
                    f"{tempfile.gettempdir()}: no room for {size} bytes of scratch ({error.strerror}); set TMPDIR to a "
                    "folder on a larger disk"
                ) from None
            self.map = mmap.mmap(file.fileno(), size)
        self.used = 0

    def keep(self, x: Tensor) -> Tensor:
        """A copy of `x` in the file, fp32, of its shape."""
        if not x.numel():
            return x.float()
        new = torch.frombuffer(self.map, dtype=torch.float32, count=x.numel(), offset=4 * self.used).view(x.shape)
        new.copy_(x)
        self.used += x.numel()
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)  # shared pages stay with the system, which may write them to the disk
        return new


class FileOPCM(FileRule):
    groups = OPCM.groups
    whole = True
    weighted = False
    buffers = 25
    passes = "two passes"
    on_gpu = False

    def survey(self, tensors: Sequence[Whole]) -> dict[str, Any]:
        """(the task vector, its factor) of every tensor."""
        scratch, found = Scratch(sum(one.numel for one in tensors)), {}
        square, squares, count = 0.0, torch.zeros(0), 1
        for one in tensors:
            part, total = one.read(), torch.zeros(0)
            count = len(part.models)
            squares = squares if len(squares) else torch.zeros(count, dtype=torch.float64)
            its = torch.zeros(count, dtype=torch.float64)
            try:
                for k, model in enumerate(part.models):
                    delta = fk.axpy(model.float(), part.base.float(), -1.0)
                    its[k] = delta.double().square().sum()
                    if k and len(part.shape) == 2:
                        new, old = delta.view(part.shape), total.view(part.shape)
                        new.copy_(projected(new, old, one.settings["alpha"], one.name))
                    total = total + delta if k else delta
            except NotFinite:
                continue
            if bool(total.isfinite().all()):
                squares += its
                square += float(total.double().square().sum())
            found[one.name] = scratch.keep(total)
        norm, mean = square**0.5, float(squares.sqrt().sum()) / count
        factor = mean / norm if norm > 0 and mean > 0 else 1.0
        return {name: (total, factor) for name, total in found.items()}

    def write(self, part: Part) -> None:
        if part.known is None:
            return not_finite(part)
        total, factor = part.known
        fk.weighted_sum([part.base, total], [1.0, factor], out=part.out, nonfinite=part.bad)


class FileKnots(FileRule):
    groups = Knots.groups
    whole = True
    weighted = False
    buffers = 8
    per_model = 8
    passes = "two passes"
    on_gpu = False

    def survey(self, tensors: Sequence[Whole]) -> dict[str, Any]:
        """(task vectors in the common basis, the basis, trims, the sign of zero mass) of every tensor."""
        scratch: Scratch | None = None
        turned: dict[str, Tensor] = {}
        bases: dict[str, Tensor] = {}
        for one in tensors:
            part = one.read()
            scratch = scratch or Scratch(sum(_kept(tensor.shape, len(part.models)) for tensor in tensors))
            deltas = torch.stack([fk.axpy(x.float(), part.base.float(), -1.0) for x in part.models])
            if len(part.shape) == 2:
                try:
                    left = common(torch.cat(list(deltas.view(-1, *part.shape)), 1), one.name)
                except NotFinite:
                    continue
                bases[one.name] = scratch.keep(left)
                deltas = (left.mT @ deltas.view(-1, *part.shape).double()).flatten(1)
            turned[one.name] = scratch.keep(deltas)
        found: dict[str, list[Trim]] = {name: [] for name in turned}
        groups: dict[Any, list[str]] = {}
        about = {one.name: one.settings for one in tensors if one.name in turned}
        for name, s in about.items():
            if turned[name].numel():
                alone = name if s["scope"] == "tensor" else None
                groups.setdefault((s["density"], s["keep"], alone), []).append(name)
        for (density, keep, _), names in groups.items():
            sizes = [turned[name].shape[1] for name in names]
            for k in range(len(turned[names[0]])):
                sources = [_parts(turned[name][k]) for name in names]
                for name, trim in zip(names, trims(sources, sizes, density, keep == "exactly"), strict=True):
                    found[name].append(trim)
        signs = 0
        for name, x in turned.items():
            if about[name]["zero"] == "majority":
                positive, negative, *_ = _elect(x, found[name])
                mass = positive + negative
                signs += int((mass > 0).sum()) - int((mass < 0).sum())
        zero = "negative" if signs < 0 else "positive"
        return {name: (x, bases.get(name), found[name], zero) for name, x in turned.items()}

    def write(self, part: Part) -> None:
        if part.known is None:
            return not_finite(part)
        turned, left, cuts, zero = part.known
        chosen = part.settings["zero"]
        state = divided(_elect(turned, cuts), part.settings["merge"])
        merged = fk.ties_finalize(*state, zero=zero if chosen == "majority" else chosen)
        if left is not None:
            merged = (left.double() @ merged.view(left.shape[1], part.shape[1]).double()).float().flatten()
        fk.weighted_sum([part.base, merged], [1.0, part.settings["scale"]], out=part.out, nonfinite=part.bad)


def _kept(shape: tuple[int, ...], models: int) -> int:
    """The most entries that KnOTS keeps of a tensor."""
    if len(shape) != 2:
        return models * math.prod(shape)
    rank = min(shape[0], models * shape[1])
    return rank * (shape[0] + models * shape[1])


def _parts(x: Tensor) -> Any:
    def parts() -> Parts:
        yield 0, x, None

    return parts


def _elect(turned: Tensor, cuts: list[Trim]) -> list[Tensor]:
    """The accumulators of TIES over the vectors `turned` `[T, n]`."""
    state = [torch.zeros(turned.shape[1]) for _ in range(4)]
    positive, negative, more, less = state
    for x, trim in zip(turned, cuts, strict=False):
        limit, cut = trim.at(0)
        fk.ties_update_(positive, negative, more, less, x, threshold=limit, cut=cut)
    return state
