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

`difference` is h = (grad L_task(theta + s g) - g) / s, with fused attention and the memory of a training step. It is
computed in full fp32, because rounding to TF32 or bf16 hides the difference. Its error is first order in s, and rounding
limits s from below, so no fixed step is right for every model: the first step of a search tries STEPS on a few images
against the exact product and keeps the one with the smallest error in the slopes. If none is within TOLERANCE, the
search uses the exact product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmerge.models.attention import differentiable_attention
from fastmerge.models.backbone import Backbone
from fastmerge.models.precision import tf32
from fastmerge.training import Learner, positions

STEPS = (1e-5, 3e-6, 1e-6, 3e-7)  # s ||g|| / ||theta||
TOLERANCE = 0.05  # relative error of a slope
CHECKED = 16  # images


def consistency(tokens: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """L_pre of eq. 7, mean over the batch. tokens, teacher: `[L, b, width]`; weights: `[L]`."""
    return ((tokens - teacher).square().sum(2) * weights[:, None]).sum(0).mean()


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


@contextlib.contextmanager
def full_fp32(backbone: Backbone) -> Iterator[None]:
    """In this context the backbone computes in fp32, whatever `--precision` says."""
    before, backbone.precision = backbone.precision, "fp32"
    try:
        with tf32(False):
            yield
    finally:
        backbone.precision = before


class Objective:
    """L_tra of a task and its gradient at the learner's present weights.

    classes: of the task. weights: `[L]`, omega_l of eq. 7; None without L_pre. relative_step: s ||g|| / ||theta|| of the
    difference, 0 for the exact product, None before `choose_step`.
    """

    def __init__(self, learner: Learner, classes: Tensor, weights: Tensor | None):
        self.learner, self.settings, self.classes, self.weights = learner, learner.config.trm, classes, weights
        difference = self.settings.curvature == "difference" and self.settings.lambda2
        self.relative_step: float | None = None if difference else 0.0

    def gradient(self, images: Tensor, labels: Tensor, teacher: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """grad L_tra `[n]`, in memory that the next gradient reuses; and the terms that have a weight, 0-d.

        images: normalised `[b, 3, s, s]`; labels: `[b]`; teacher: class tokens `[L, b, width]`, None without L_pre.
        """
        settings, terms = self.settings, Terms()
        if not settings.lambda2:
            total = self._without_curvature(images, labels, teacher, terms)
        elif self.relative_step == 0:
            total = self._exact(images, labels, teacher, terms)
        else:
            total = self._difference(images, labels, teacher, terms)
        weights = {"L_task": settings.lambda0, "L_pre": settings.lambda1, "gradient_energy": -settings.lambda2}
        loss = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return total, {"loss": loss, **terms}

    def choose_step(self, images: Tensor, labels: Tensor, slopes: Callable[[Tensor], Tensor]) -> None:
        """Set `relative_step` from the first CHECKED images. slopes: h `[n]` -> `[2]`, its products with d and P. The
        weights are unchanged."""
        few = min(CHECKED, self.learner.parts(len(images))[0][0].stop)
        images, labels = images[:few], labels[:few]
        with full_fp32(self.learner.backbone):
            g = self._task_gradient(images, labels).clone()
            exact = slopes(self.hessian_product(images, labels, g))
            errors = [(slopes(self._difference_of(images, labels, g, s)) / exact - 1).abs().max() for s in STEPS]
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

    # -- the three ways ----------------------------------------------------------------------------------------------

    def _without_curvature(self, images: Tensor, labels: Tensor, teacher: Tensor | None, terms: Terms) -> Tensor:
        flat = self.learner.flat
        flat.zero_grad()
        for part, share in self.learner.parts(len(images)):
            task, pre = self._losses(images[part], labels[part], _cut(teacher, part))
            terms.add(share, L_task=task, L_pre=pre)
            first = self._first_order(task, pre)
            assert first is not None
            (first * share).backward(inputs=flat.parameters)
        return flat.gradient

    def _exact(self, images: Tensor, labels: Tensor, teacher: Tensor | None, terms: Terms) -> Tensor:
        flat, parts = self.learner.flat, self.learner.parts(len(images))
        whole = list(flat.views(self._task_gradient(images, labels).clone())) if len(parts) > 1 else None
        flat.zero_grad()
        for part, share in parts:
            with differentiable_attention():
                task, pre = self._losses(images[part], labels[part], _cut(teacher, part))
            assert task is not None
            terms.add(share, L_task=task, L_pre=pre)
            g = torch.autograd.grad(task, flat.parameters, create_graph=True, allow_unused=True)
            along = [None if x is None else x.detach() for x in g] if whole is None else whole
            # grad of first - 2 lambda2 <g, along>
            graphs, vectors = _pairs(g, along)
            vectors = [x * (-2 * self.settings.lambda2 * share) for x in vectors]
            if (first := self._first_order(task, pre)) is not None:
                graphs, vectors = [*graphs, first], [*vectors, torch.full_like(first, share)]
            torch.autograd.backward(graphs, vectors, inputs=flat.parameters)
        terms["gradient_energy"] = torch.nn.utils.get_total_norm([x for x in along if x is not None]).square()
        return flat.gradient

    def _difference(self, images: Tensor, labels: Tensor, teacher: Tensor | None, terms: Terms) -> Tensor:
        flat, settings = self.learner.flat, self.settings
        flat.zero_grad()
        pull = None if teacher is None else torch.zeros_like(flat.gradient)  # lambda1 grad L_pre
        with full_fp32(self.learner.backbone):
            for part, share in self.learner.parts(len(images)):
                task, pre = self._losses(images[part], labels[part], _cut(teacher, part))
                assert task is not None
                terms.add(share, L_task=task, L_pre=pre)
                (task * share).backward(inputs=flat.parameters, retain_graph=pre is not None)
                if pre is not None and pull is not None:
                    values = torch.autograd.grad(pre * (settings.lambda1 * share), flat.parameters, allow_unused=True)
                    for view, value in zip(flat.views(pull), values, strict=True):
                        if value is not None:  # the last projection has no part in the class tokens
                            view += value
            g = flat.gradient.clone()
            h = self._difference_of(images, labels, g, self.relative_step)
        terms["gradient_energy"] = g.norm().square()
        total = h.mul_(-2 * settings.lambda2).add_(g, alpha=settings.lambda0)
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
        if self.settings.lambda0 or self.settings.lambda2:
            task = F.cross_entropy(self.learner.head(features, self.classes), positions(labels, self.classes))
        return task, pre

    def _first_order(self, task: Tensor | None, pre: Tensor | None) -> Tensor | None:
        """lambda0 L_task + lambda1 L_pre; None if both weights are 0."""
        weighted = ((self.settings.lambda0, task), (self.settings.lambda1, pre))
        terms = [weight * value for weight, value in weighted if weight and value is not None]
        return torch.stack(terms).sum() if terms else None

    def _task_gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """g `[n]`, in the flat gradient."""
        flat = self.learner.flat
        flat.zero_grad()
        for part, share in self.learner.parts(len(images)):
            task, _ = self._losses(images[part], labels[part])
            assert task is not None
            (task * share).backward(inputs=flat.parameters)
        return flat.gradient

    def _difference_of(self, images: Tensor, labels: Tensor, g: Tensor, relative_step: float | None) -> Tensor:
        """(grad L_task(theta + s g) - g) / s, in the flat gradient. relative_step: s ||g|| / ||theta||."""
        assert relative_step
        theta = self.learner.theta
        here, s = theta.clone(), relative_step * theta.norm() / g.norm().clamp_min(torch.finfo(g.dtype).tiny)
        theta.addcmul_(s, g)
        h = self._task_gradient(images, labels).sub_(g).div_(s)
        theta.copy_(here)
        return h
