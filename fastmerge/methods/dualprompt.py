"""DualPrompt (Wang et al. 2022, ECCV, arXiv 2204.04799): one prompt for all tasks and one for each, in a frozen transformer.

    python -m fastmerge --method dualprompt --dualprompt.expert-length 20

Prompts are prefixes of keys and values (eq. 4). The general one is trained by all tasks at the first blocks. At later blocks
every task trains its own, whose key is pulled to the task's queries: the loss is cross-entropy minus `pull` times their
cosine (eq. 7). At test time an image gets the prompt of the key nearest to its query (section 4.2).

Differences. Released code lets a test batch vote (`--dualprompt.choice batch`). A length counts keys, and as many values, as
in released code; in the paper's formula half of it are keys. As in PILOT a task's prompt starts as the previous task's and
its key uniform in (-1, 1). The pool grows with the tasks, where released code must know their number. The head sees the
backbone's own feature; the query is that feature without prompts, for CLIP after the projection.
"""

from __future__ import annotations

import torch

from fastmerge.methods.prompt_method import PromptMethod
from fastmerge.models.backbone import Backbone
from fastmerge.models.prompt_pools import DualPool


class DualPrompt(PromptMethod):
    groups = ("dualprompt",)
    ignores = ("training.lr", "training.warmup_steps", "training.weight_decay")
    layers = ("general_layers", "expert_layers")

    def start(self, backbone: Backbone, generator: torch.Generator) -> DualPool:
        s = self.settings
        blocks, lengths = (s.general_layers, s.expert_layers), (s.general_length, s.expert_length)
        vote = s.choice == "batch"
        return DualPool.start(blocks, lengths, backbone.width, backbone.feature_dim, s.pull, vote, generator)
