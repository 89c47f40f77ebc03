"""The merge rules on parts of tensors. Formulas, papers and defaults: `fastmerge.merging` and `fastmerge.settings.merging`.

A rule that has one formula per entry takes any part of a tensor, so a tensor of any size needs little memory.
Thresholds of TIES over the whole vector come from histograms, which add up over parts. Model Stock and SLERP need norms
of a tensor and read it as a whole, straight from the file. Random numbers are functions of the position in all tensors,
sorted by name. Hence no bit depends on the size of the parts, on shards, or on the order in the files.

Weights: `average` divides them by their sum (mergekit's linear); task arithmetic multiplies the task vectors; DARE divides by
their sum, as its rule averages; TIES elects the sign of the weighted sum, which it divides by the weights that agree
(mergekit), or with `merge=sum` does not divide; SLERP of two models takes t = w2 / (w1 + w2), and goes on like this with
more. Those of by_tensor.py are described there. The others refuse weights.
"""

from __future__ import annotations

from typing import ClassVar

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.files.by_tensor import (
    FileBreadcrumbs,
    FileCoFiMA,
    FileDella,
    FileDellaLinear,
    FileFisher,
    FileIsoC,
    FileKarcher,
    FileRegMean,
    FileSCE,
    FileTSV,
)
from fastmerge.files.rule import FileRule, Part
from fastmerge.files.surveyed import FileKnots, FileOPCM
from fastmerge.merging import slerp
from fastmerge.merging.ties import divided


class Average(FileRule):
    needs_base = False

    def write(self, part: Part) -> None:
        total = sum(part.weights)
        fk.weighted_sum(part.models, [w / total for w in part.weights], out=part.out, nonfinite=part.bad)


class TaskArithmetic(FileRule):
    groups = ("task_arithmetic",)

    def write(self, part: Part) -> None:
        weights = [part.settings["scale"] * w for w in part.weights]
        fk.weighted_sum(part.models, weights, initial=part.base, out=part.out, nonfinite=part.bad)


class MagMax(FileRule):
    groups = ("magmax",)
    weighted = False

    def write(self, part: Part) -> None:
        models = part.models if part.settings["ties"] == "later" else part.models[::-1]
        fk.magmax_merge(models, initial=part.base, scale=part.settings["scale"], out=part.out, nonfinite=part.bad)


class Dare(FileRule):
    groups = ("dare",)

    def write(self, part: Part) -> None:
        total, s = sum(part.weights), part.settings
        fk.dare_merge(
            part.models,
            s["p"],
            [s["scale"] * w / total for w in part.weights],
            initial=part.base,
            seed=part.seed,
            subsequence=1,  # as the rule of a stream counts its models
            offset=part.position,
            out=part.out,
            nonfinite=part.bad,
        )


class Ties(FileRule):
    groups: ClassVar[tuple[str, ...]] = ("ties",)
    buffers = 4
    passes = "one pass, and three for the thresholds"

    def delta(self, part: Part, k: int, model: Tensor) -> tuple[Tensor, Tensor | None]:
        """(x, base) of model k: its task vector is the difference, or x itself where the base is None."""
        return model, part.base

    def write(self, part: Part) -> None:
        zero = part.settings["zero"]
        self.finish(part, self.accumulate(part), "positive" if zero == "majority" else zero)

    def accumulate(self, part: Part) -> list[Tensor]:
        state = [torch.zeros(part.out.numel(), device=part.out.device) for _ in range(4)]
        for k, (weight, trim) in enumerate(zip(part.weights, part.trims, strict=True)):
            if not weight:  # no sign, no share
                continue
            (x, base), (limit, cut) = self.delta(part, k, part.models[k]), trim.at(part.start)
            p, n, more, less = state
            fk.ties_update_(p, n, more, less, x, initial=base, threshold=limit, cut=cut, weight=weight, count="weights")
        return state

    def finish(self, part: Part, state: list[Tensor], zero: str) -> None:
        s = part.settings
        state = divided(state, s["merge"])
        fk.ties_finalize(*state, initial=part.base, scale=s["scale"], zero=zero, out=part.out, nonfinite=part.bad)


class DareTies(Ties):
    groups = ("dare", "ties")
    buffers = 5

    def delta(self, part: Part, k: int, model: Tensor) -> tuple[Tensor, Tensor | None]:
        delta = fk.dare_delta(
            model,
            part.settings["p"],
            initial=part.base,
            seed=part.seed,
            subsequence=1 + k,
            offset=part.position,
            out=torch.empty(model.numel(), device=model.device),
        )
        return delta, None


class RandomMix(FileRule):
    needs_base = False
    weighted = False

    def write(self, part: Part) -> None:
        key = {"seed": part.seed, "subsequence": 0, "offset": part.position}
        fk.random_mix(part.models, out=part.out, nonfinite=part.bad, **key)


class ModelStock(FileRule):
    whole = True
    weighted = False
    passes = "three passes"

    def write(self, part: Part) -> None:
        fk.stock_merge(part.models, initial=part.base, out=part.out, nonfinite=part.bad)


class Slerp(FileRule):
    whole = True
    needs_base = False
    least = 2
    buffers = 1
    passes = "three passes"

    def write(self, part: Part) -> None:
        self.into(part.out, part.models, part, slerp.Slerp.parallel)

    def into(self, out: Tensor, tensors: list[Tensor], part: Part, parallel: float) -> None:
        """Write the interpolation of all `tensors` into `out`."""
        merged, total = tensors[0], part.weights[0]
        for k, (x, weight) in enumerate(zip(tensors[1:], part.weights[1:], strict=True)):
            total += weight
            new = out if k == len(tensors) - 2 else torch.empty(out.numel(), device=out.device)
            t = weight / total if total else 1.0
            fk.weighted_sum([merged, x], _shares(merged, x, t, parallel), out=new, nonfinite=part.bad)
            merged = new


class NuSlerp(Slerp):
    needs_base = True
    buffers = 1
    per_model = 1

    def write(self, part: Part) -> None:
        deltas = [fk.axpy(x.float(), part.base, -1.0) for x in part.models]
        merged = torch.empty(part.out.numel(), device=part.out.device)
        self.into(merged, deltas, part, slerp.NuSlerp.parallel)
        part.bad.zero_()  # the task vectors may be finite where their sum with the base is not
        fk.weighted_sum([merged, part.base], [1.0, 1.0], out=part.out, nonfinite=part.bad)


def _shares(a: Tensor, b: Tensor, t: float, parallel: float) -> list[float]:
    """The factors of slerp(a, b, t): see `fastmerge.merging.slerp`."""
    left, right, apart = (fk.segment_norms(x, initial=y)[0] for x, y in ((a, None), (b, None), (b, a)))
    norms = (left * right).sqrt()
    cosine = ((left + right - apart) / (2 * norms)).clamp(-1, 1) if norms > 0 else torch.tensor(1.0)
    if abs(cosine) > parallel or not cosine == cosine:
        return [1 - t, t]
    angle = cosine.acos()
    return [float(((1 - t) * angle).sin() / angle.sin()), float((t * angle).sin() / angle.sin())]


class WiseFT(FileRule):
    groups = ("wise_ft",)
    weighted = False
    most = 1

    def write(self, part: Part) -> None:
        fk.lerp(part.base, part.models[0], part.settings["alpha"], out=part.out, nonfinite=part.bad)


class CoMA(FileRule):
    groups = ("coma",)
    needs_base = False
    weighted = False

    def write(self, part: Part) -> None:
        lam, count = part.settings["lam"], len(part.models)  # the weights that repeated interpolation gives
        weights = [(1.0 if k == 0 else lam) * (1 - lam) ** (count - 1 - k) for k in range(count)]
        fk.weighted_sum(part.models, weights, out=part.out, nonfinite=part.bad)


FILE_RULES: dict[str, FileRule] = {
    "average": Average(),
    "task-arithmetic": TaskArithmetic(),
    "ties": Ties(),
    "dare": Dare(),
    "dare-ties": DareTies(),
    "della": FileDella(),
    "della-linear": FileDellaLinear(),
    "magmax": MagMax(),
    "randmix": RandomMix(),
    "stock": ModelStock(),
    "slerp": Slerp(),
    "nuslerp": NuSlerp(),
    "karcher": FileKarcher(),
    "wise-ft": WiseFT(),
    "coma": CoMA(),
    "breadcrumbs": FileBreadcrumbs(),
    "sce": FileSCE(),
    "iso-c": FileIsoC(),
    "tsv": FileTSV(),
    "opcm": FileOPCM(),
    "knots": FileKnots(),
    "fisher": FileFisher(),
    "cofima": FileCoFiMA(),
    "regmean": FileRegMean(),
}
