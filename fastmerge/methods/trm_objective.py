"""TRM's objective and its gradient with respect to theta (arXiv 2605.08311, eq. 6-14), for the search (trm.py).

    L_tra = lambda0 L_task + lambda1 L_pre - lambda2 ||g||^2,   g = grad L_task
    grad L_tra = lambda0 g + lambda1 grad L_pre - 2 lambda2 h,  h = Hessian(L_task) g

A term with weight 0 is not computed. Cost of a step in units of one forward pass; a backward pass costs two (the
matrix products are counted in tests/test_trm_objective.py):

    without curvature  3   forward 1, backward 2: L_task and L_pre share both
    exact              9   forward 1, g with its graph 2, one backward through both graphs 6: all three terms together
                      12   in parts (`--micro-batch`): h needs g of the whole batch, which is computed first, 3
    difference         8   forward 1, g 2, grad L_pre 2, g at theta + s g 3; in parts too

`exact` needs attention with a second derivative (unfused) and keeps the activations of forward and backward.

`--trm.scale relative` divides each lambda by the size of its term on the first batch of a search, and `--trm.energy bounded`
replaces ||g||^2 = E by E / (E + E_0) with E_0 from there, whose gradient is 2 h E_0 / (E + E_0)^2. The paper has neither.

`difference` is h = (grad L_task(theta + s g) - g) / s, with fused attention and the memory of a training step. It is
computed in full fp32, because rounding to TF32 or bf16 hides the difference. Its error is first order in s, and rounding
limits s from below, so no fixed step is right for every model: the first step of a search tries STEPS on a few images
against the exact product and keeps the one with the smallest error in the slopes. If none is within TOLERANCE, the
search uses the exact product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmerge.models.attention import differentiable_attention
from fastmerge.models.precision import full_fp32
from fastmerge.training import Learner, positions

STEPS = (1e-5, 3e-6, 1e-6, 3e-7)  # s ||g|| / ||theta||
TOLERANCE = 0.05  # relative error of a slope
CHECKED = 16  # images


def consistency(tokens: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """L_pre of eq. 7, mean over the batch. tokens, teacher: `[L, b, width]`; weights: `[L]`."""
    return ((tokens - teacher).square().sum(2) * weights[:, None]).sum(0).mean()


Parts = list[tuple[slice, float]]  # of a batch, with the share of each


class Terms(dict[str, Tensor]):
    """The terms of L_tra, summed over the parts of a batch."""

    def add(self, share: float, **values: Tensor | None) -> None:
        for name, value in values.items():
            if value is not None:
                self[name] = self.get(name, 0) + value.detach() * share


def _pairs(graph: Sequence[Tensor | None], along: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients that depend on theta, and their vectors."""
    pairs = zip(graph, along, strict=True)
    found = [(x, y) for x, y in pairs if x is not None and y is not None and x.requires_grad]
    return [x for x, _ in found], [y for _, y in found]


def _cut(teacher: Tensor | None, part: slice) -> Tensor | None:
    return None if teacher is None else teacher[:, part]


class Objective:
    """L_tra of a task and its gradient at the learner's present weights.

    classes: of the task. weights: `[L]`, omega_l of eq. 7; None without L_pre. relative_step: s ||g|| / ||theta|| of the
    difference, 0 for the exact product, None before `choose_step`. sizes: `[3]` float64, L_task, L_pre and E at the start
    of the search; None if they are not needed, or before `measure`.
    """

    def __init__(self, learner: Learner, classes: Tensor, weights: Tensor | None):
        self.learner, self.settings, self.classes, self.weights = learner, learner.config.trm, classes, weights
        difference = self.settings.curvature == "difference" and self.settings.lambda2
        self.relative_step: float | None = None if difference else 0.0
        self.lambdas = (self.settings.lambda0, self.settings.lambda1, self.settings.lambda2)
        self.needs_sizes = self.settings.scale == "relative" or self.settings.energy == "bounded"
        self.sizes: Tensor | None = None

    def measure(self, images: Tensor, labels: Tensor, teacher: Tensor | None) -> None:
        """Take the sizes of the terms from this batch at the present weights."""
        parts = self.learner.parts.of(len(images), "train")
        terms, needs_g = Terms(), self.lambdas[0] or self.lambdas[2]
        g = (self._task_gradient(images, labels, parts) if needs_g else self.learner.flat.gradient.zero_()).clone()
        with torch.no_grad():
            for part, share in parts:
                task, pre = self._losses(images[part], labels[part], _cut(teacher, part))
                terms.add(share, L_task=task, L_pre=pre)
        zero = g.new_zeros(())
        task, pre = terms.get("L_task", zero), terms.get("L_pre", zero)
        self.learner.ranks.add_(g, task, pre)
        self.take_sizes(torch.stack([task, pre, g.norm().square()]).double().cpu())

    def take_sizes(self, sizes: Tensor) -> None:
        """Continue with these sizes. A term of size 0 keeps its lambda."""
        self.sizes, (task, pre, energy) = sizes, sizes.tolist()
        if self.settings.scale == "relative":
            energy = 1.0 if self.settings.energy == "bounded" else energy  # that one is relative already
            given = (self.settings.lambda0, self.settings.lambda1, self.settings.lambda2)
            found = [weight / (size or 1.0) for weight, size in zip(given, (task, pre, energy), strict=True)]
            self.lambdas = (found[0], found[1], found[2])

    def energy(self, value: Tensor) -> tuple[Tensor, Tensor | float]:
        """The term of eq. 13 without its sign, for ||g||^2 = `value`, and its derivative with respect to `value`."""
        if self.settings.energy == "square":
            return value, 1.0
        assert self.sizes is not None
        start = float(self.sizes[2]) or 1.0
        return value / (value + start), start / (value + start).square()

    def gradient(self, images: Tensor, labels: Tensor, teacher: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """grad L_tra `[n]`, in memory that the next gradient reuses; and the terms that have a weight, 0-d. Where several
        processes share the batch, the gradient is this one's part of the sum over all; the terms are whole.

        images: normalised `[b, 3, s, s]`; labels: `[b]`; teacher: class tokens `[L, b, width]`, None without L_pre.
        """
        settings, terms = self.settings, Terms()
        if not settings.lambda2:
            total = self._without_curvature(images, labels, teacher, terms)
        elif self.relative_step == 0:
            total = self._exact(images, labels, teacher, terms)
        else:
            total = self._difference(images, labels, teacher, terms)
        if teacher is not None:
            terms.setdefault("L_pre", self.learner.theta.new_zeros(()))
        if settings.lambda0 or settings.lambda2:
            terms.setdefault("L_task", self.learner.theta.new_zeros(()))
        self.learner.ranks.add_(*(terms[name] for name in ("L_task", "L_pre") if name in terms))
        weighted = [self.lambdas[k] * terms[name] for k, name in enumerate(("L_task", "L_pre")) if name in terms]
        if "gradient_energy" in terms:
            weighted.append(-self.lambdas[2] * self.energy(terms["gradient_energy"])[0])
        loss = torch.stack(weighted).sum()
        return total, {"loss": loss, **terms}

    def choose_step(self, images: Tensor, labels: Tensor, slopes: Callable[[Tensor], Tensor]) -> None:
        """Set `relative_step` from the first CHECKED images. slopes: h `[n]` -> `[2]`, its products with d and P. The
        weights are unchanged."""
        first = self.learner.parts.of(len(images), "curvature")[:1]
        few = self.learner.ranks.agree(min([CHECKED, *(part.stop - part.start for part, _ in first)]))
        images, labels = images[:few], labels[:few]
        alone = [(slice(0, len(images)), 1.0)]  # every process takes all of them, so that all choose the same step
        with full_fp32(self.learner.backbone):
            g = self._task_gradient(images, labels, alone).clone()
            exact = slopes(self.hessian_product(images, labels, g))
            found = [slopes(self._difference_of(images, labels, g, g, s, alone)) for s in STEPS]
            errors = [(value / exact - 1).abs().max() for value in found]
        error, best = torch.stack(errors).nan_to_num(torch.inf).min(0)
        self.relative_step = STEPS[int(best)] if error <= TOLERANCE else 0.0

    def hessian_product(self, images: Tensor, labels: Tensor, g: Tensor) -> Tensor:
        """Hessian(L_task) g of a batch that is not cut into parts, in the flat gradient. g: any vector `[n]`."""
        flat = self.learner.flat
        flat.zero_grad()
        with differentiable_attention():
            task, _ = self._losses(images, labels)
        assert task is not None
        graph = torch.autograd.grad(task, flat.parameters, create_graph=True, allow_unused=True)
        torch.autograd.backward(*_pairs(graph, list(flat.views(g))), inputs=flat.parameters)
        return flat.gradient

    def first_order_terms(self, images: Tensor, labels: Tensor, teacher: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """The gradients `[n]` of lambda0 L_task and lambda1 L_pre, each in memory that the next one reuses."""
        flat, parts = self.learner.flat, self.learner.parts.of(len(images), "search")
        if self.lambdas[0]:
            yield "L_task", self._task_gradient(images, labels, parts).mul_(self.lambdas[0])
        if teacher is not None and self.lambdas[1]:
            flat.zero_grad()
            for part, share in parts:
                _, pre = self._losses(images[part], labels[part], _cut(teacher, part))
                assert pre is not None
                (pre * (self.lambdas[1] * share)).backward(inputs=flat.parameters)
            yield "L_pre", flat.gradient

    # -- the three ways ----------------------------------------------------------------------------------------------

    def _without_curvature(self, images: Tensor, labels: Tensor, teacher: Tensor | None, terms: Terms) -> Tensor:
        flat = self.learner.flat
        flat.zero_grad()
        for part, share in self.learner.parts.of(len(images), "search"):
            task, pre = self._losses(images[part], labels[part], _cut(teacher, part))
            terms.add(share, L_task=task, L_pre=pre)
            first = self._first_order(task, pre)
            assert first is not None
            (first * share).backward(inputs=flat.parameters)
        return flat.gradient

    def _exact(self, images: Tensor, labels: Tensor, teacher: Tensor | None, terms: Terms) -> Tensor:
        flat, parts = self.learner.flat, self.learner.parts.of(len(images), "curvature")
        whole = None
        if len(parts) > 1 or self.learner.ranks.size > 1:
            g_whole = self._task_gradient(images, labels, self.learner.parts.of(len(images), "train")).clone()
            self.learner.ranks.add_(g_whole)
            whole = list(flat.views(g_whole))
        flat.zero_grad()
        # tensor by tensor: the norm of one long fp32 vector is only good to 1e-4
        energy = torch.nn.utils.get_total_norm(whole or []).square()
        for part, share in parts:
            with differentiable_attention():
                task, pre = self._losses(images[part], labels[part], _cut(teacher, part))
            assert task is not None
            terms.add(share, L_task=task, L_pre=pre)
            g = torch.autograd.grad(task, flat.parameters, create_graph=True, allow_unused=True)
            along: Sequence[Tensor | None] = [None if x is None else x.detach() for x in g] if whole is None else whole
            if whole is None:
                energy = torch.nn.utils.get_total_norm([x for x in along if x is not None]).square()
            # grad of first - 2 lambda2 <g, along>
            graphs, vectors = _pairs(g, along)
            vectors = [x * (self.energy(energy)[1] * -2 * self.lambdas[2] * share) for x in vectors]
            if (first := self._first_order(task, pre)) is not None:
                graphs, vectors = [*graphs, first], [*vectors, torch.full_like(first, share)]
            torch.autograd.backward(graphs, vectors, inputs=flat.parameters)
        terms["gradient_energy"] = energy
        return flat.gradient

    def _difference(self, images: Tensor, labels: Tensor, teacher: Tensor | None, terms: Terms) -> Tensor:
        flat = self.learner.flat
        flat.zero_grad()
        pull = None if teacher is None else torch.zeros_like(flat.gradient)  # lambda1 grad L_pre
        with full_fp32(self.learner.backbone):
            for part, share in self.learner.parts.of(len(images), "search"):
                task, pre = self._losses(images[part], labels[part], _cut(teacher, part))
                assert task is not None
                terms.add(share, L_task=task, L_pre=pre)
                (task * share).backward(inputs=flat.parameters, retain_graph=pre is not None)
                if pre is not None and pull is not None:
                    values = torch.autograd.grad(pre * (self.lambdas[1] * share), flat.parameters, allow_unused=True)
                    for view, value in zip(flat.views(pull), values, strict=True):
                        if value is not None:  # the last projection has no part in the class tokens
                            view += value
        g = flat.gradient.clone()  # this process's part
        whole = g
        if self.learner.ranks.size > 1:
            whole = g.clone()
            self.learner.ranks.add_(whole)
        h = self._difference_of(
            images, labels, g, whole, self.relative_step, self.learner.parts.of(len(images), "train")
        )
        terms["gradient_energy"] = energy = whole.norm().square()
        total = h.mul_(self.energy(energy)[1] * -2 * self.lambdas[2]).add_(g, alpha=self.lambdas[0])
        return total if pull is None else total.add_(pull)

    # -- their parts ---------------------------------------------------------------------------------------------------

    def _losses(
        self, images: Tensor, labels: Tensor, teacher: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """L_task and L_pre in one forward; None where nothing needs it."""
        backbone, task, pre = self.learner.backbone, None, None
        if teacher is None:
            features = backbone(images)
        else:
            assert self.weights is not None
            features, tokens = backbone.class_tokens(images)
            pre = consistency(tokens, teacher, self.weights)
        if self.lambdas[0] or self.lambdas[2]:
            task = F.cross_entropy(self.learner.head(features, self.classes), positions(labels, self.classes))
        return task, pre

    def _first_order(self, task: Tensor | None, pre: Tensor | None) -> Tensor | None:
        """lambda0 L_task + lambda1 L_pre; None if both weights are 0."""
        weighted = ((self.lambdas[0], task), (self.lambdas[1], pre))
        terms = [weight * value for weight, value in weighted if weight and value is not None]
        return torch.stack(terms).sum() if terms else None

    def _task_gradient(self, images: Tensor, labels: Tensor, parts: Parts) -> Tensor:
        """g `[n]` of these parts, in the flat gradient."""
        flat = self.learner.flat
        flat.zero_grad()
        for part, share in parts:
            task, _ = self._losses(images[part], labels[part])
            assert task is not None
            (task * share).backward(inputs=flat.parameters)
        return flat.gradient

    def _difference_of(
        self, images: Tensor, labels: Tensor, g: Tensor, along: Tensor, relative_step: float | None, parts: Parts
    ) -> Tensor:
        """(grad L_task(theta + s along) - g) / s over these parts, in the flat gradient. g: their gradient at theta; along:
        that of the whole batch. relative_step: s ||along|| / ||theta||."""
        assert relative_step
        theta = self.learner.theta
        here, s = theta.clone(), relative_step * theta.norm() / along.norm().clamp_min(torch.finfo(g.dtype).tiny)
        theta.addcmul_(s, along)
        with full_fp32(self.learner.backbone):
            h = self._task_gradient(images, labels, parts).sub_(g).div_(s)
        theta.copy_(here)
        return h
