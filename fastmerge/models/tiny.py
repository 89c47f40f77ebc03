"""The embedded backbone: a tiny CLIP (open_clip classes) with a byte-level tokenizer, 32 x 32 pixels, patch 8.

Pre-trained by scripts/pretrain_tiny.py on characters that are not classes of the default `glyphs` run; the weights are
part of the package. It accepts real images too, but knows only characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = Path(__file__).parent / "assets" / "tiny-glyphs.safetensors"  # fp16
IMAGE_SIZE = 32
IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.3, 0.3, 0.3)
CONTEXT = 77
START, END = 256, 257  # END is the largest token: open_clip pools the text at the argmax
CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 258, "width": 96, "heads": 3, "layers": 2},
}


def tokenize(texts: Sequence[str]) -> Tensor:
    """Int64 [n, 77]: START, the bytes of the text in UTF-8, END, zeros.

    As in open_clip's tokenizer, a long text is cut (here after 75 bytes) and END is kept.
    """
    tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        content = [START, *text.encode()[: CONTEXT - 2], END]
        row[: len(content)] = torch.tensor(content)
    return tokens


def create_tiny() -> open_clip.CLIP:
    """Random weights, drawn from torch's global generator."""
    return open_clip.CLIP(**CONFIG)


def load_tiny(path: str | Path = WEIGHTS) -> open_clip.CLIP:
    """The pre-trained model: CPU, fp32, eval mode. `path`: a state dict of `create_tiny()` in any float type."""
    with torch.random.fork_rng(devices=[]):  # random weights are overwritten, so leave the generator as it was
        model = create_tiny()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return model.eval()
