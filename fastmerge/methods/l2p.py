"""L2P, learning to prompt (Wang et al. 2022, CVPR, arXiv 2112.08654): a pool of prompts beside a frozen transformer.

    python -m fastmerge --method l2p --l2p.pool 10 --l2p.top 5

An image's query is its feature under the frozen backbone. The prompts of the N keys nearest to it by cosine are inserted
as tokens before the first block (section 4.1), and the loss is cross-entropy minus `pull` times the sum of these cosines
(eq. 5). All tasks train the same pool; its size does not depend on their number.

Differences. Released code (JAX and PILOT) lets a batch vote, also at test time, so that predictions depend on the batch; the
paper chooses per image, and so does this by default (`--l2p.choice batch` votes, over the images computed at once). The paper
classifies the mean output at the prompts' positions; here it is the backbone's own feature, as in CODA-Prompt's copy, so that
every head works. Prompts and keys start uniform in (-1, 1) as in PILOT. Not with the tiny model, whose 17 tokens one random
prompt disturbs more than a few epochs repair: there prompts start near the mean token of the first batch (`--l2p.start mean`,
docs/LOG.md). The query is the backbone's feature, for CLIP after the projection; the papers use an ImageNet ViT, which has
none.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastmerge.config import Config
from fastmerge.data.scenario import Task
from fastmerge.errors import UserError
from fastmerge.methods.prompt_method import PromptMethod
from fastmerge.models.backbone import Backbone
from fastmerge.models.prompt_pools import L2PPool
from fastmerge.models.prompts import mean_tokens

NOISE = 0.1  # of the standard deviation of the mean token's entries: prompts that are the same would stay the same


class L2P(PromptMethod):
    groups = ("l2p",)
    ignores = ("training.lr", "training.warmup_steps", "training.weight_decay")
    inserted = True
    pool: L2PPool

    @classmethod
    def check(cls, config: Config, backbone: Backbone) -> None:
        super().check(config, backbone)
        if config.l2p.top > config.l2p.pool:
            raise UserError(
                f"--l2p.top {config.l2p.top}: the pool has {config.l2p.pool} prompts; expected at most as many"
            )

    @torch.no_grad()
    def first_batch(self, task: Task, pixels: Tensor) -> None:
        if task.index or self.settings.start == "uniform":
            return
        learner = self.learner
        mean = learner.without_gradient(partial(mean_tokens, learner.backbone), pixels).mean(0)
        drawn = self.start(learner.backbone, learner.generator("pool")).prompts.to(mean.device)  # not what is there
        self.pool.prompts.copy_(drawn.mul_(NOISE * mean.std()).add_(mean))

    def start(self, backbone: Backbone, generator: torch.Generator) -> L2PPool:
        s, d = self.settings, backbone.feature_dim
        return L2PPool.start(s.pool, s.length, backbone.width, d, s.top, s.pull, s.choice == "batch", generator)
