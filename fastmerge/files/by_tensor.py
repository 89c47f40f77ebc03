"""Merge rules of a training (`fastmerge.merging`) on files: the rule itself, on one tensor after the other.

So the formulas, papers and defaults are theirs. Iso-C, TSV, Breadcrumbs, SCE, RegMean and the Karcher mean treat every tensor
alone and need it as a whole. Fisher merging has one formula per entry and takes any part.

Fisher, CoFiMA and RegMean need tensors of every model's data, `--statistics`, one file per model with the names of the
model's tensors: diagonal Fishers of their shapes, or the mean of X^T X, [in, in], of the inputs X of linear layers. Where no
file has one, the tensor is averaged. A weight is [out, in] (nn.Linear); one that is used as x @ W has its input first, and
the metadata `axes` of the file, such as {"visual.proj": 0} as JSON, says so where the weight is square.

Weights: Breadcrumbs, Iso-C and TSV multiply the task vectors by them, Fisher the Fishers (Matena & Raffel, section 3).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.errors import UserError
from fastmerge.files.rule import FileRule, Part, not_finite
from fastmerge.merging.breadcrumbs import Breadcrumbs
from fastmerge.merging.della import Della, DellaLinear, check_probabilities
from fastmerge.merging.fisher import CoFiMA, Fisher
from fastmerge.merging.iso_c import IsoC
from fastmerge.merging.karcher import Karcher
from fastmerge.merging.regmean import RegMean
from fastmerge.merging.rule import Base, Rule
from fastmerge.merging.sce import SCE
from fastmerge.merging.spectral import NotFinite
from fastmerge.merging.tsv import TSV


class ByTensor(FileRule):
    """rule: the rule of a training, with one group of settings at most."""

    rule: ClassVar[type[Rule]]
    whole = True

    def write(self, part: Part) -> None:
        size = part.out.numel()
        base = Base(part.base.float(), [0, size], [size], part.seed, [part.shape], position=part.position)
        rule = self.rule(base, *[SimpleNamespace(**part.settings)] * bool(self.groups))
        try:
            for k in range(len(part.models)):
                rule.update(self.model(part, k), self.about(part, k))
            merged = rule.merged(torch.empty(size, device=part.out.device))
        except NotFinite:
            return not_finite(part)
        part.out.copy_(merged)
        part.bad.copy_((~part.out.isfinite()).sum())

    def model(self, part: Part, k: int) -> Tensor:
        return part.models[k].float()

    def about(self, part: Part, k: int) -> Any:
        """What the rule needs of the data of model k."""
        return None


class ByTaskVector(ByTensor):
    """Weights are factors of the task vectors."""

    def model(self, part: Part, k: int) -> Tensor:
        theta, weight = super().model(part, k), part.weights[k]
        return theta if weight == 1 else fk.lerp(part.base.float(), theta, weight)


class FileBreadcrumbs(ByTaskVector):
    rule, groups = Breadcrumbs, Breadcrumbs.groups
    buffers = 9


class FileIsoC(ByTaskVector):
    rule, groups = IsoC, IsoC.groups
    buffers = 17


class FileTSV(ByTaskVector):
    rule, groups = TSV, TSV.groups
    buffers = 31


class FileSCE(ByTensor):
    rule, groups = SCE, SCE.groups
    weighted = False
    per_model = 15


class FileKarcher(ByTensor):
    rule = Karcher
    needs_base = False
    weighted = False
    per_model = 24


class FileDella(ByTensor):
    rule: ClassVar[type[Rule]] = Della
    groups = Della.groups
    weighted = False
    buffers = 18

    def check(self, settings: dict[str, Any], where: str) -> None:
        p, epsilon = settings["p"], settings["epsilon"]
        check_probabilities(p, epsilon, f"{where}: p={p:g} and epsilon={epsilon:g}")
        if settings["scope"] == "global":
            raise UserError(
                f"{where}: scope=global ranks the whole model, but files are merged by tensor: row or tensor"
            )


class FileDellaLinear(FileDella):
    rule = DellaLinear


class FileFisher(ByTensor):
    rule = Fisher
    groups: ClassVar[tuple[str, ...]] = ("fisher",)
    ignored = frozenset({"labels", "per", "images"})  # of the pass over images that computes the Fishers
    whole = False
    needs_base = False
    buffers = 5
    statistics = "the diagonal Fisher"

    def about(self, part: Part, k: int) -> Tensor:
        if not bool((part.statistics[k] < 0).logical_not().all()):  # NaN is for the message about the output
            raise UserError(f"--statistics: file {k + 1} has negative entries, and a diagonal Fisher has none")
        return (part.statistics[k].float() + part.settings["floor"]) * part.weights[k]


class FileCoFiMA(FileFisher):
    rule = CoFiMA
    groups = ("fisher", "cofima")


class FileRegMean(ByTensor):
    rule, groups = RegMean, RegMean.groups
    needs_base = False
    weighted = False
    buffers = 19
    statistics = "the mean of X^T X for its linear layers"

    def about(self, part: Part, k: int) -> dict[int, tuple[int, Tensor]]:
        gram = part.statistics[k].float()
        return {0: (part.settings["axis"], gram.view(part.shape[part.settings["axis"]], -1))}
