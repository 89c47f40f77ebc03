"""CODA-Prompt (Smith et al. 2023, CVPR, arXiv 2211.13218): prompts as weighted sums of components, in a frozen transformer.

    python -m fastmerge --method coda --coda.components 10

At every chosen block an image's prompt is the sum of all components, each times the cosine of its key and the image's query
times its attention vector (eq. 4, 5). Every task adds components and trains only these (section 4.2). The loss is
cross-entropy plus `ortho` times the mean squared deviation from orthonormal rows of components, keys and attention vectors,
those of earlier tasks included (eq. 6, 7).

Differences. Released code has M / T components for each of T tasks, which it must know, and none where T > M; here a task's
number is a setting, so that a sequence can go on. Its scripts set `ortho` to 0 and start the new components by Gram-Schmidt
orthogonal to the old ones; here they start that way too, while there are dimensions left, and the penalty is the paper's. The
weights are not normalised over the components, as in both. The head sees the backbone's own feature.

The gradient is clipped to norm 1 (`--clip`); the released code does not clip: `coda:clip=0` switches it off. The released
rate of epoch e of K is lr cos(99 pi e / (200 (K - 1))), a quarter of a wave by epoch; here half a wave, by step
(training.py). The released penalty has a factor 1e-6 besides `ortho`.
"""

from __future__ import annotations

import torch

from fastmerge.config import Config
from fastmerge.errors import UserError
from fastmerge.methods.prompt_method import PromptMethod
from fastmerge.models.backbone import Backbone
from fastmerge.models.prompt_pools import CodaPool


class CODA(PromptMethod):
    groups = ("coda",)
    ignores = ("training.lr", "training.weight_decay")
    layers = ("layers",)
    constant = False

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        super().check(config, backbone)
        if config.coda.length % 2:
            raise UserError(
                f"--coda.length {config.coda.length}: half are keys and half values; expected an even number"
            )

    def start(self, backbone: Backbone, generator: torch.Generator) -> CodaPool:
        s, d = self.settings, backbone.feature_dim
        return CodaPool.start(s.layers, s.components, s.length, backbone.width, d, s.ortho, generator)
