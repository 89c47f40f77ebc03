"""The mean and standard deviation of the images. They belong to the weights, not to the architecture: timm's ViT-B/16 was
trained with three pairs, and a wrong pair silently costs accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fastmerge.errors import UserError, nearest

Numbers = tuple[float, float, float]


class Normalisation(NamedTuple):
    """mean, std: of the three channels of pixels in 0..1. source: where they come from, in words."""

    mean: Numbers
    std: Numbers
    source: str

    def __str__(self) -> str:
        return f"{shown(self.mean, self.std)} ({self.source})"


def shown(mean: Numbers, std: Numbers) -> str:
    return ", ".join(f"{what} {' '.join(f'{x:.4g}' for x in xs)}" for what, xs in (("mean", mean), ("std", std)))


def choose(
    name: str,
    tags: Mapping[str, tuple[Numbers, Numbers]],
    default: tuple[Numbers, Numbers],
    *,
    tag: str | None,
    file: str | None,
) -> Normalisation:
    """The normalisation of weights of model `name`. tags: (mean, std) of every tag of the model. tag: of the weights; None
    if unknown, then all tags have to agree. file: the weights are in this file; None for random weights.

    Raises:
        UserError: the model has no such tag, or its tags differ and nothing says which one counts.
    """
    if tag is not None:
        if tag not in tags:
            raise UserError(
                f"--model {name}.{tag}: {name} has no tag {tag!r}.{nearest(tag, tags)} Tags: {', '.join(tags) or 'none'}"
            )
        return Normalisation(*tags[tag], f"tag {tag}")
    groups: dict[tuple[Numbers, Numbers], list[str]] = {}
    for known, pair in tags.items():
        groups.setdefault(pair, []).append(known)
    if len(groups) == 1:
        return Normalisation(*next(iter(groups)), f"all tags of {name} agree")
    if groups and file is not None:
        choices = "".join(f"\n  {shown(*pair)}: {some(known)}" for pair, known in groups.items())
        raise UserError(
            f"--pretrained {file}: the tags of {name} have several means and standard deviations, and the file does not say "
            f"which one it was trained with:{choices}\n"
            f"Name the tag that the file comes from, --model {name}.TAG, or give --mean and --std"
        )
    return Normalisation(*default, f"default of {name}")


def some(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
