"""Augmentation. Oracles: torchvision's RandomResizedCrop for the distribution of crops, hand-made images for geometry.

pytest tests/test_data_augment.py
"""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from fastmerge.data.augment import normalise, random_resized_crop, to_float


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramps(b: int, size: int) -> torch.Tensor:
    """Return images whose red grows from left to right and green from top to bottom, by one level per pixel."""
    line = torch.arange(size, dtype=torch.uint8)
    image = torch.stack([line.expand(size, size), line[:, None].expand(size, size), torch.zeros(size, size).byte()])
    return image.expand(b, 3, size, size)


def crops(b: int, size: int, **options) -> torch.Tensor:
    """Return [b, 4] left, top, width, height of the crops in pixels, read off the ramps; negative width: mirrored."""
    out = random_resized_crop(ramps(b, size), generator(1), **options) * 255
    middle = slice(size // 4, 3 * size // 4)  # away from the borders, where there is nothing to interpolate with
    red, green = out[:, 0, size // 2, middle], out[:, 1, middle, size // 2]
    width, height = ((x[:, -1] - x[:, 0]) / (x.shape[1] - 1) * size for x in (red, green))
    left = red[:, 0] + 0.5 - width / size * (size // 4 + 0.5)
    top = green[:, 0] + 0.5 - height / size * (size // 4 + 0.5)
    return torch.stack([left, top, width, height], 1)


def test_the_whole_image_comes_back_unchanged():
    images = torch.randint(0, 256, (4, 3, 17, 17), dtype=torch.uint8, generator=generator())
    out = random_resized_crop(images, generator(), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, to_float(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.05, 1.0)])
def test_crops_follow_the_law_of_torchvision(scale):
    b, size = 1200, 96
    left, top, width, height = crops(b, size, scale=scale).double().unbind(1)
    assert (left > -0.1).all() and (left + width < size + 0.1).all()
    assert (top > -0.1).all() and (top + height < size + 0.1).all()
    torch.manual_seed(0)
    image = torch.empty(3, 10_000, 10_000, device="meta")  # large, so that torchvision's rounding does not matter
    drawn = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(b)]
    i, j, h, w = (torch.tensor(x, dtype=torch.float64) / 10_000 for x in zip(*drawn, strict=True))
    ours = (width * height / size**2, width / height, left / size, top / size)
    for mine, theirs in zip(ours, (w * h, w / h, j, i), strict=True):
        for q in (0.1, 0.25, 0.5, 0.75, 0.9):
            assert abs(mine.quantile(q) - theirs.quantile(q)) < 0.04


def test_flip_mirrors_half_of_the_images():
    left, _, width, _ = crops(1000, 64, flip=True).unbind(1)
    mirrored = width < 0
    assert 0.42 < mirrored.float().mean() < 0.58
    assert (left[mirrored] > 32).all() and (left[~mirrored] < 32).all()
    assert (crops(1000, 64)[:, 2] > 0).all()


def test_same_seed_same_bits_and_images_keep_their_own_crop():
    images = torch.randint(0, 256, (6, 3, 24, 24), dtype=torch.uint8, generator=generator())
    one = random_resized_crop(images, generator(5), flip=True)
    assert torch.equal(one, random_resized_crop(images, generator(5), flip=True))
    assert not torch.equal(one, random_resized_crop(images, generator(6), flip=True))
    other = images.clone()
    other[2] = 0
    assert torch.equal(random_resized_crop(other, generator(5), flip=True)[3:], one[3:])


def test_options_do_not_shift_the_generator():
    states = []
    for options in ({}, {"flip": True}, {"scale": (1.0, 1.0)}):
        g = generator(3)
        random_resized_crop(ramps(5, 16), g, **options)
        states.append(g.get_state())
    assert all(torch.equal(states[0], state) for state in states)


def test_normalise():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=generator())
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    out = normalise(to_float(images), mean, std)
    for c in range(3):
        torch.testing.assert_close(out[:, c], (images[:, c] / 255 - mean[c]) / std[c])


def test_constants_made_in_inference_mode_can_still_take_part_in_training():
    values = (0.123, 0.456, 0.789)
    with torch.inference_mode():
        normalise(torch.rand(1, 3, 2, 2), values, values)
    x = torch.rand(1, 3, 2, 2, requires_grad=True)
    normalise(x, values, values).sum().backward()
    torch.testing.assert_close(x.grad[0, 1], torch.full((2, 2), 1 / 0.456))


@pytest.mark.gpu
def test_crops_are_the_same_on_the_gpu():
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator())
    on_cpu = random_resized_crop(images, generator(2), flip=True)
    on_gpu = random_resized_crop(images.cuda(), generator(2), flip=True)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=0)
