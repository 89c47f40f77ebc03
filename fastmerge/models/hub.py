"""Access to the Hugging Face hub: its local cache, and the network only where the user allows it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fastmerge.errors import UserError


@contextlib.contextmanager
def hub_access(allowed: bool) -> Iterator[None]:
    """In this context, the Hugging Face client (also used by transformers) reads only its cache, unless `allowed`."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def from_hub_cache(repository: str, names: tuple[str, ...]) -> Path | None:
    """Return the first of `names` in the local cache of the Hugging Face hub; never use the network."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return None


def missing_weights(name: str, tag: str, looked: list[str], why: str = "") -> UserError:
    """The error for weights that are not on this machine."""
    places = "\n  ".join(looked)
    return UserError(
        f"weights {tag!r} of model {name} are not here{why}. Looked for:\n  {places}\n"
        "Allow the download with --download, give a checkpoint file with --pretrained FILE, use --pretrained none, "
        "or use the small embedded model with --model tiny"
    )
