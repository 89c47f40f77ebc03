"""TRM, Trajectory Regularized Merging (arXiv 2605.08311; equation numbers of its first version).

    python -m fastmerge --method trm --trm.replace anchored --trm.lambda1 0.1 --trm.lambda2 0.01

Training phase: fine-tune the merged model theta_{t-1} to theta_t. Merging phase: search alpha and beta of

    theta(alpha, beta) = theta_{t-1} + alpha d + beta P,  d = theta_t - theta_{t-1},  P a random unit vector _|_ d  (eq. 3-5)
    L_tra = lambda0 L_task + lambda1 L_pre + lambda2 L_curv,       L_curv = -||grad L_task||^2                    (eq. 6-14)

on task t's images (lambda0 is 1 in the paper, 0 in some rows of its Table 3). No autograd graph runs through the merge:
with G = grad L_tra with respect to theta (trm_objective.py), dL_tra/dalpha = <G, d> and dL_tra/dbeta = <G, P>. One fused
pass computes both products; it makes d, P and the mask in registers from theta_{t-1}, theta_t and a seed.

Random replacement (end of the method section). Read literally, a fraction replace_ratio of theta_init's entries comes
from theta_{t-1} or theta_t, and the task vectors are added to the result. A replaced entry then gets its task vector
twice, and the mean distance from theta_init grows 1.6-fold per task (`--trm.replace literal`; see
tests/test_method_trm.py). So the default is `anchored`: a replaced entry keeps its value from theta_{t-1} or theta_t,
and the search moves the others. `none` only searches the plane. theta_init cancels in both, so only `literal` keeps it.

`--trm.space span` adds gamma v to the merged model, v = theta_{t-1} - theta_init: with d it spans the plane of both task
vectors that the paper speaks of and eq. 4 leaves out. gamma starts at 0; dL_tra/dgamma = <G, v>. It keeps theta_init.
`--trm.per block` gives every transformer block its own coefficients (trm_groups.py), in the same passes.
`--trm.teacher`, `--trm.scale` and `--trm.energy` change terms of the objective (trm_objective.py). The last step of a search
logs where it ended and why; see `Search.report`.

Our choices where the paper is silent: the search sees images without augmentation, so the teacher's class tokens are
computed once per task; the squared norm of eq. 7 is averaged over the batch; Adam updates alpha, beta with a fixed lr.

With `--lora-rank` d is zero outside the weights that LoRA adapts, but P spans all weights: the search moves the others too.
"""

from __future__ import annotations

import math
from typing import Any

import fastmerge_kernels as fk
import torch
from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.cache import TaskImages
from fastmerge.data.scenario import Task
from fastmerge.errors import UserError
from fastmerge.methods.method import Method, Tensors
from fastmerge.methods.trm_groups import Groups
from fastmerge.methods.trm_objective import Objective
from fastmerge.models.backbone import Backbone
from fastmerge.models.recompute import blocks_of
from fastmerge.training import Batches, Learner, Phase, Train, load_optimiser, optimiser_tensors
from fastmerge.wording import counted


class TRM(Method):
    """It keeps only the model, and theta_init under `--trm.replace literal` and `--trm.space span`.

    During a task: `previous`, theta_{t-1}.
    """

    groups = ("trm",)

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.settings = learner.config.trm
        keeps = self.settings.replace == "literal" or self.settings.space == "span"
        self.initial = learner.theta.clone() if keeps else None
        self.warned = False  # of a search that only walked

    @classmethod
    def merge_epochs(cls, config: Config) -> int:
        trm = config.trm
        return config.training.merge_epochs if trm.lambda0 or trm.lambda1 or trm.lambda2 else 0

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        super().check(config, backbone)
        if config.trm.per == "block":
            blocks_of(backbone, "--trm.per block")
            if config.training.prompt_length:
                raise UserError(
                    "--trm.per block: --prompt-length merges prefixes, which are in no block; leave one out"
                )
        if config.trm.lambda1 and cls.merge_epochs(config):
            backbone.check_class_tokens()
            if config.trm.layer_b is not None and config.trm.layer_b > backbone.layers:
                raise UserError(
                    f"--trm.layer-b {config.trm.layer_b}: {backbone.name} has {counted(backbone.layers, 'layer')}; "
                    f"expected 1 to {backbone.layers}"
                )

    def begin(self, task: Task) -> Tensors:
        return {"previous": self.learner.theta.clone()}

    def train(self, task: Task, images: TaskImages, during: Tensors) -> Phase:
        return Train(self.learner, task, images)

    def merge(self, task: Task, images: TaskImages, during: Tensors) -> Phase | None:
        if task.index == 0 and not self.settings.merge_first:
            return None
        return Search(self, task, images, during["previous"])

    def state_dict(self) -> Tensors:
        return {} if self.initial is None else {"initial": self.initial}

    def load_state_dict(self, tensors: Tensors) -> None:
        if self.initial is not None:
            self.initial.copy_(tensors["initial"])


def layer_weights(layers: int, b: int) -> Tensor:
    """omega_l of eq. 7, `[layers]` fp32: q(l) = e before layer b and e^(l-b) from b on (l = 1..L), divided by its sum."""
    q = torch.tensor([math.e if layer < b else math.exp(layer - b) for layer in range(1, layers + 1)])
    return q / q.sum()


NAMES = ("alpha", "beta", "gamma")
WALKED = 0.9  # of Adam's steps in one direction


class Search(Phase):
    """The merging phase: alpha, beta (and gamma) by gradient descent on eq. 14 (eq. 15). previous: theta_{t-1}, `[n]`."""

    name = "merge"
    batches: Batches

    def __init__(self, method: TRM, task: Task, images: TaskImages, previous: Tensor):
        self.method, self.task, self.images = method, task, images
        self.learner, self.settings = method.learner, method.settings
        # without any term there is nothing to search: the merge is the one at the start
        self.batches = Batches(self.learner, task, images, self.name, method.merge_epochs(self.learner.config))
        self.steps = self.batches.steps
        classes, omega = torch.tensor(task.classes, device=self.learner.device), None
        if self.settings.lambda1:
            layers = self.learner.backbone.layers
            omega = layer_weights(layers, self.settings.layer_b or layers // 2).to(self.learner.theta)
        self.objective = Objective(self.learner, classes, omega)
        self.previous, self.current = previous, self.learner.theta.clone()  # theta_{t-1}, theta_t
        self.past: Tensor | None = None  # v
        start = [self.settings.alpha, self.settings.beta]
        if self.settings.space == "span":
            assert method.initial is not None
            self.past = previous - method.initial
            start.append(0.0)
        values = torch.tensor(start, dtype=torch.float64, device=self.learner.device)
        self.groups = Groups.of(self.learner.flat, self.learner.backbone, self.settings.per)
        if self.groups.names:
            values = values[:, None].repeat(1, len(self.groups.names))
        self.coefficients = torch.nn.Parameter(values)  # alpha, beta, gamma; each of every group if there are several
        self.optimiser = torch.optim.Adam([self.coefficients], lr=self.settings.lr)
        self.teacher: Tensor | None = None
        self.walked: Tensor | None = None
        self._epoch = -1

    # -- the merge -------------------------------------------------------------------------------------------------

    def aim(self, i: int) -> None:
        """Choose the random numbers of step i's epoch and compute the products of r and d that define P (one pass)."""
        epoch = i // self.batches.per_epoch if self.settings.direction == "epoch" else 0
        if epoch != self._epoch:
            self._epoch = epoch
            self.random: dict[str, Any] = {
                "seed": self.learner.seed_for("trm", self.task.index),
                "subsequence": epoch,
                "replace": self.settings.replace,
                "ratio": self.settings.replace_ratio,
            }
            self.direction = fk.trm_direction(self.previous, self.current, **self.random)

    def place(self, coefficients: Tensor | None = None) -> None:
        """theta <- theta(alpha, beta, gamma), one pass and one more for gamma. coefficients: by default the present ones."""
        given = self.coefficients.detach() if coefficients is None else coefficients
        initial, theta = self.method.initial if self.settings.replace == "literal" else None, self.learner.theta
        for start, end, group in self.groups.pieces:
            piece = slice(start, end)
            alpha, beta, *gamma = given.view(len(given), -1)[:, group]
            fk.trm_merge(
                self.previous[piece], self.current[piece], alpha, beta, self.direction, **self.random,
                initial=None if initial is None else initial[piece], offset=start, out=theta[piece],
            )  # fmt: skip
            if self.past is not None:
                theta[piece].addcmul_(self.past[piece], gamma[0].to(theta.dtype))

    # -- the search ------------------------------------------------------------------------------------------------

    def teach(self) -> Tensor:
        """The class tokens that `--trm.teacher` asks for, by default (cls(theta_t) + cls(theta_{t-1})) / 2, of every image:
        `[L, n, width]` fp32, kept for the search."""
        backbone, theta = self.learner.backbone, self.learner.theta
        tokens = torch.zeros(backbone.layers, len(self.images), backbone.width, device=theta.device, dtype=theta.dtype)
        models = {"current": [self.current], "previous": [self.previous]}.get(self.settings.teacher)
        models = models or [self.current, self.previous]
        for weights in models:
            theta.copy_(weights)
            for rows in torch.arange(len(self.images)).split(self.learner.config.training.batch_size):
                pixels, _ = self.images.batch(rows)
                seen = self.learner.without_gradient(lambda x: backbone.class_tokens(x)[1], pixels, dim=1)
                tokens[:, int(rows[0]) : int(rows[-1]) + 1].add_(seen, alpha=1 / len(models))
        return tokens

    def step(self, i: int) -> dict[str, Tensor]:
        settings = self.settings
        if settings.direction == "epoch" and i and i % self.batches.per_epoch == 0:
            self.coefficients.data[1] = settings.beta  # of all groups: beta belonged to the old P
        self.aim(i)
        if self.teacher is None and settings.lambda1:
            self.teacher = self.teach()
        rows = self.batches.rows(i)
        pixels, labels = self.images.batch(rows)
        images = self.learner.plain(pixels)
        self.place()
        if self.objective.relative_step is None:
            self.objective.choose_step(images, labels, self.slopes)
        teacher = None if self.teacher is None else self.teacher[:, rows.to(self.teacher.device, non_blocking=True)]
        if self.objective.needs_sizes and self.objective.sizes is None:
            self.objective.measure(images, labels, teacher)
        gradient, terms = self.objective.gradient(images, labels, teacher)
        slopes = self.slopes(gradient)
        self.learner.ranks.add_(slopes)
        terms |= dict(zip(NAMES, self.means(), strict=False))
        if i == self.steps - 1:
            terms |= self.parts_of(slopes, images, labels, teacher)
        self.coefficients.grad = slopes.to(self.coefficients.dtype)
        self.learner.parts.changes()
        self.optimiser.step()
        return terms | (self.report() if i == self.steps - 1 else {})

    def means(self) -> Tensor:
        """alpha, beta, gamma: the mean over the groups, where there are several."""
        values = self.coefficients.detach()
        return values.mean(1) if self.groups.names else values.clone()

    def slopes(self, gradient: Tensor) -> Tensor:
        """The products of a gradient `[n]` with d, P and v in every group, in the shape of the coefficients."""
        found = torch.zeros_like(self.coefficients).detach()
        for start, end, group in self.groups.pieces:
            piece, column = slice(start, end), found.view(len(found), -1)[:, group]
            column[:2] += fk.subspace_gradient(
                gradient[piece], self.previous[piece], self.current[piece], self.direction, **self.random, offset=start
            )[:2]
            if self.past is not None:
                column[2] += torch.dot(gradient[piece], self.past[piece])
        return found

    # -- where it ended --------------------------------------------------------------------------------------------

    def parts_of(self, total: Tensor, images: Tensor, labels: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:
        """How much of the slopes `total` each weighted term gives, named `<term>_slope_<coefficient>`, over all groups. The
        curvature's is what the others leave."""
        found, left = {}, total.clone()
        for name, gradient in self.objective.first_order_terms(images, labels, teacher):
            found[name] = self.slopes(gradient)
            self.learner.ranks.add_(found[name])
            left -= found[name]
        if self.settings.lambda2:
            found["gradient_energy"] = left
        return {
            f"{name}_slope_{coefficient}": value
            for name, slopes in found.items()
            for coefficient, value in zip(NAMES, slopes.view(len(slopes), -1).sum(1), strict=False)
        }

    def report(self) -> dict[str, Tensor]:
        """Where the search ended, after its last step, without gamma v:

        effective_alpha: the position along d, <theta - theta_{t-1}, d> / ||d||^2, which the mask pulls to its middle.
        mask_noise: the distance from that line by the random replacement, in ||d||. beta_share: ||beta P|| / ||d||.
        sign_steps: how far alpha went, as a share of what Adam's steps allow; near 1 the search only walked, with a slope
        that kept its sign, and would have ended elsewhere with more steps.

        With `--trm.per block` also alpha_<group>, beta_<group> and effective_alpha_<group>; mask_noise is then the distance
        from the plane of all d_k, and sign_steps that of the mean alpha. Where training moved nothing, ||d|| counts as 1 and
        effective_alpha is 0.
        """
        values = self.coefficients.detach().clone()
        values[1:] = 0
        self.place(values)  # without beta P and gamma v
        d, moved = self.current - self.previous, self.learner.theta - self.previous
        count = len(self.groups.names) or 1
        along, sizes, off = (d.new_zeros(count, dtype=torch.float64) for _ in range(3))
        for start, end, k in self.groups.pieces:
            along[k] += torch.dot(moved[start:end], d[start:end])
            sizes[k] += torch.dot(d[start:end], d[start:end])
        position = along / sizes.where(sizes > 0, 1.0)  # a block that training left alone stays at 0
        for start, end, k in self.groups.pieces:
            off[k] += (moved[start:end] - position[k] * d[start:end]).square().sum()
        size, beta = sizes.sum(), self.coefficients.detach()[1]
        size = size.where(size > 0, 1.0)
        values = self.coefficients.detach().clone()
        if self.groups.names:  # P is a unit vector as a whole, not in a group
            before = self.learner.theta.clone()
            values[2:] = 0
            self.place(values)
            beta = (self.learner.theta - before).norm()
        most = self.settings.lr * self.steps
        alpha = self.means()[0]
        self.walked = (alpha - self.settings.alpha).abs() / most if most else alpha.new_zeros(())
        found = {
            "effective_alpha": along.sum() / size,
            "mask_noise": (off.sum() / size).sqrt(),
            "beta_share": beta.abs() / size.sqrt(),
            "sign_steps": self.walked,
        }
        for k, name in enumerate(self.groups.names):
            alpha, beta, *_ = self.coefficients.detach()[:, k].clone()
            found |= {f"alpha_{name}": alpha, f"beta_{name}": beta, f"effective_alpha_{name}": position[k]}
        return found

    def finish(self) -> None:
        """theta_t <- theta(alpha, beta)."""
        self.aim(max(self.steps - 1, 0))
        self.place()
        if self.walked is not None and not self.method.warned and float(self.walked) > WALKED:
            self.method.warned = True
            alpha = float(self.means()[0])
            self.learner.parts.say(
                f"{self.task.name}: alpha moved by nearly the same step {self.steps} times in one direction, to {alpha:.2f}; "
                "the number of steps decided where. Longer --merge-epochs or a larger --trm.lr lets the search settle"
            )
        self.learner.flat.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        own = {"current": self.current, "coefficients": self.coefficients.detach()}
        if self.objective.sizes is not None:
            own["sizes"] = self.objective.sizes
        if self.objective.relative_step is not None:
            own["curvature_step"] = torch.tensor(self.objective.relative_step, dtype=torch.float64)
        return own | optimiser_tensors(self.optimiser)

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.current.copy_(tensors["current"])
        self.coefficients.data.copy_(tensors["coefficients"])
        if "sizes" in tensors:
            self.objective.take_sizes(tensors["sizes"].cpu())
        if "curvature_step" in tensors:
            self.objective.relative_step = float(tensors["curvature_step"])
        load_optimiser(self.optimiser, tensors)
