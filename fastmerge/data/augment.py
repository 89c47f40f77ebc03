"""Batched augmentation on the device, after the data path of Keller Jordan's cifar10-airbench.

Parameters are drawn on the CPU, so a seed gives the same crops on every device; on the CPU it also gives the same bits.
Images are [b, 3, S, S].
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def random_resized_crop(
    images: Tensor,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = False,
) -> Tensor:
    """A random crop of every image, resized back to S x S: uint8 [b, 3, S, S] -> float32 in 0..1 on the same device.

    Crops are drawn as in torchvision's RandomResizedCrop (Inception crop, Szegedy et al. 2015): area uniform in
    `scale`, aspect ratio log-uniform in `ratio`, the first of ten draws that fits, else the whole image. Two
    differences: borders are not rounded to whole pixels, and the input has already been cropped to a square. Bilinear;
    a crop is never larger than the result, so antialiasing is not needed. flip: mirror each image with probability 1/2.

    generator: a CPU generator; the options do not change how many values are drawn from it.
    """
    b, _, size, _ = images.shape
    u = torch.rand(b, 23, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * u[:, :10]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    root_ratio = torch.exp(0.5 * (low + (high - low) * u[:, 10:20]))
    width, height = area.sqrt() * root_ratio, area.sqrt() / root_ratio  # fractions of the image's side
    fits = (width <= 1) & (height <= 1)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    whole = ~fits.any(1)
    width, height = (x.gather(1, first).squeeze(1).masked_fill(whole, 1.0) for x in (width, height))
    # grid_sample coordinates run from -1 to 1: the centre of a crop of width w can move by 1 - w to either side.
    x, y = (2 * u[:, 20] - 1) * (1 - width), (2 * u[:, 21] - 1) * (1 - height)
    if flip:
        width = torch.where(u[:, 22] < 0.5, -width, width)
    crop = torch.stack([width, x, height, y]).to(images.device, non_blocking=True)[..., None]  # [4, b, 1]
    line = (torch.arange(size, device=images.device) * 2 + 1) / size - 1  # pixel centres
    # affine_grid is not used: its matrix product is slower, and rounds positions to TF32 where TF32 is allowed.
    grid = torch.empty(b, size, size, 2, device=images.device)
    grid[..., 0] = (crop[0] * line + crop[1])[:, None, :]
    grid[..., 1] = (crop[2] * line + crop[3])[:, :, None]
    return F.grid_sample(to_float(images), grid, mode="bilinear", padding_mode="border", align_corners=False)


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in 0..1."""
    return images.float().div_(255)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images - mean) / std per channel; mean, std: one value per channel, in the units of `images`."""
    return (images - _channels(tuple(mean), images.device)) / _channels(tuple(std), images.device)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`values` as [c, 1, 1] on the device; cached, to copy them once and not at every step."""
    with torch.inference_mode(False):  # else a first call in inference would make the tensor unusable in training
        return torch.tensor(values, device=device)[:, None, None]
