"""Text embeddings of class names (the weight of a text head), stored in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from fastmerge.models.openclip import TextEncoder


def text_weights(
    encoder: TextEncoder,
    class_names: Sequence[str],
    templates: Sequence[str],
    key: str,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """`[classes, d]` fp32 on the CPU: every template encoded and normalised, averaged per class, normalised again.

    Stored in the user's cache folder under a hash of `key`, names and templates, if the folder is usable.
    Encoding runs on `device` (results agree up to rounding); `progress(done, prompts)` is called after every batch.
    """
    about = json.dumps([key, list(class_names), list(templates)])
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = root / "fastmerge" / "heads" / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.safetensors"
    try:
        return load_file(path)["weight"]
    except (OSError, SafetensorError, KeyError):
        pass  # missing or damaged: computed below
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    rows = encoder.encode(prompts, device=device, progress=progress).view(len(class_names), len(templates), -1)
    weight = F.normalize(rows.mean(1), dim=1)
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.part")
    with contextlib.suppress(OSError, SafetensorError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode  # what the umask allows; safetensors would make it private
            save_file({"weight": weight.contiguous()}, temporary)
            temporary.chmod(mode)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # exists only after a failure, such as a full disk
    return weight
