"""Overprinted glyphs, embedded in the package: the class is the glyph in one ink, and a second glyph is printed over it.

    python -m fastmerge --dataset glyphs-hard
    python -m fastmerge --dataset glyphs-hard --scenario dil        # one style per task

The first ink absorbs red and some green, the second absorbs blue and some green. So the red channel shows the class
almost alone, while a grey copy of the image shows both glyphs alike. The embedded backbone was pre-trained on dark ink of
nearly no colour and does not tell the inks apart; training learns that on any of the classes. The second glyph is any
character of the pre-training, so it may be a class too. Six styles add another difficulty each; they are the domains.

Classes are characters that the backbone saw in pre-training, one at a time: their names are known to the text head, and
what has to be learnt is the new look (with `glyphs` it is the other way round). A data set of n classes has the first n
of these characters in the order of glyphs.order, sorted by code point. Atlas, names and prompts are those of `glyphs`.

All pixels are computed on the host in integers from rounded parameters, so every machine gets the same bytes. An image
depends on the split's seed, its style, character and copy alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmerge.data.dataset import Dataset, Split
from fastmerge.data.glyphs import (
    FACES,
    HELD_OUT,
    SIZE,
    TEMPLATES,
    atlas,
    characters,
    order,
    pretraining_rows,
    uniforms,
)
from fastmerge.errors import UserError

SEEDS = {"train": 3, "test": 4}  # others than those of `glyphs`
CHUNK = 256  # images made at a time, so few that the intermediate arrays stay in the CPU's cache
PITCH = SIZE + 2  # pixels of a row of a cell with its border of zeros
KNOTS = 5  # of a random field along a side
FIRST = np.array([256, 140, 0], np.int32)  # what the ink of the class absorbs of red, green, blue; 256 is all
SECOND = FIRST[::-1]
BANK = 1 << 16


@dataclass(frozen=True)
class Style:
    """Ranges of uniform random values: [-x, x] unless the comment says otherwise."""

    rotation: float = 15.0  # degrees
    shear: float = 0.15
    tint: float = 0.1  # added to every channel of ink and paper
    warp: float = 0.0  # pixels that a knot of the displacement field moves
    texture: float = 0.0  # [x / 2, x]: amplitude of the paper's texture
    fragment: bool = False  # a third glyph, in black, at the edge


STYLES = {
    "warped": Style(warp=1.5),
    "tinted": Style(tint=0.2),
    "textured": Style(texture=0.25),
    "crowded": Style(fragment=True),
    "plain": Style(),
    "tilted": Style(rotation=30.0, shear=0.2),
}
ZOOM, SHIFT = 0.2, 3.0  # logarithm, pixels: [-x, x]
CONTRAST = 0.45  # [x, 1]: difference between light paper and dark ink
NOISE = 0.1  # [0, x]: standard deviation relative to white

# Columns of the random numbers of an image.
NUMBERS = 128
AFFINE = slice(0, 5)
FIELD, FIELD_X = slice(5, 30), slice(30, 55)
OTHER = slice(40, 47)  # the second glyph; shared with FIELD_X, which one style uses
LIGHT = [55, 57]
INK, PAPER = slice(58, 61), slice(61, 64)
TEXTURE = slice(64, 68)
FRAGMENT = slice(68, 73)


@functools.cache
def _padded() -> np.ndarray:
    """The atlas with a border of one pixel without ink, flat: cells * 34 * 34, uint8."""
    return np.pad(atlas().reshape(-1, SIZE, SIZE), ((0, 0), (1, 1), (1, 1))).reshape(-1)


@functools.cache
def _grain() -> np.ndarray:
    """[BANK - 1023, 1024] int32 view: windows of triangular noise in [-256, 256]."""
    bank = np.random.RandomState(0).randint(-128, 129, size=(2, BANK)).sum(0).astype(np.int32)
    return np.lib.stride_tricks.sliding_window_view(bank, SIZE * SIZE)


@functools.cache
def _weights() -> np.ndarray:
    """[32, KNOTS] int32: linear interpolation between knots; a row sums to 256."""
    place = (np.arange(SIZE) * 2 + 1) * (KNOTS - 1) * 256 // (2 * SIZE)
    low = np.minimum(place // 256, KNOTS - 2)
    weights = np.zeros((SIZE, KNOTS), np.int32)
    weights[np.arange(SIZE), low] = 256 - (place - 256 * low)
    weights[np.arange(SIZE), low + 1] = place - 256 * low
    return weights


def _rounded(values: np.ndarray, unit: float) -> np.ndarray:
    """values / unit as int32, with two axes for the pixels."""
    return np.rint(values * (1 / unit)).astype(np.int32)[..., None, None]


def _field(knots: np.ndarray, amplitude: float) -> np.ndarray:
    """Bilinear field [k, 32, 32] int32 in 1/256 of the unit of the amplitude, through knots [k, KNOTS * KNOTS] in [-1, 1]."""
    grid = np.rint(knots * amplitude * 256).astype(np.int32).reshape(-1, KNOTS, KNOTS)
    weights = _weights()
    rows = np.einsum("yj,kji->kyi", weights, grid) >> 8  # [k, 32, KNOTS]
    return np.einsum("xi,kyi->kyx", weights, rows) >> 8


def _drawn(
    cells: np.ndarray,
    angle: np.ndarray,
    zoom: np.ndarray | float,
    shear: np.ndarray | float,
    shift: tuple[np.ndarray, np.ndarray],
    warp: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Coverage [k, 32, 32] int32 in 0..255 of the cells [k] after an affine map and a displacement; bilinear.

    angle in radians, shift in pixels (rounded to halves), warp in 1/256 pixel. Rounding the parameters removes the last
    bits, in which cos and exp differ between machines.
    """
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    xx, xy, yx, yy = (_rounded(v, 1 / 4096) for v in (cos + shear * sin, sin - shear * cos, -sin, cos))
    halves = np.arange(SIZE, dtype=np.int32) * 2 + 1 - SIZE  # half pixels from the middle
    x, y = halves - _rounded(shift[0], 0.5), halves[:, None] - _rounded(shift[1], 0.5)
    middle = (SIZE + 1) * 128  # in 1/256 pixel from the centre of the border's first pixel
    column, row = ((xx * x + xy * y) >> 5) + middle, ((yx * x + yy * y) >> 5) + middle
    if warp is not None:
        column, row = column + warp[0], row + warp[1]
    last = (SIZE + 1) * 256 - 1
    column, row = np.clip(column, 0, last), np.clip(row, 0, last)
    right, down = column & 255, row & 255
    corner = cells.astype(np.int32)[:, None, None] * PITCH**2 + (row >> 8) * PITCH + (column >> 8)
    a, b, c, d = (_padded()[corner + step].astype(np.int32) for step in (0, 1, PITCH, PITCH + 1))
    return ((a * (256 - right) + b * right) * (256 - down) + (c * (256 - right) + d * right) * down) >> 16


def _printed(image: np.ndarray, coverage: np.ndarray, ink: np.ndarray, absorbs: np.ndarray | int = 256) -> np.ndarray:
    """image [k, 3, 32, 32] int32 with ink [k, 3, 1, 1] where the coverage is, in the channels that it absorbs."""
    mask = coverage[:, None] * np.broadcast_to(absorbs, 3).astype(np.int32)[:, None, None] >> 8
    return image + ((ink - image) * mask >> 8)


def render(style: Style, cells: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Images uint8 [k, 3, 32, 32] of the cells [k] (atlas row * 12 + face), from random numbers u [k, NUMBERS] in [0, 1)."""
    signed = 2 * u - 1
    others = np.asarray(pretraining_rows())

    def any_cell(row: np.ndarray, face: np.ndarray) -> np.ndarray:
        return others[(row * len(others)).astype(np.int64)] * len(FACES) + (face * len(FACES)).astype(np.int64)

    def jittered(cells: np.ndarray, s: np.ndarray, of: Style, warp=None) -> np.ndarray:
        angle, zoom, shear = np.deg2rad(of.rotation) * s[:, 0], np.exp(ZOOM * s[:, 1]), of.shear * s[:, 2]
        return _drawn(cells, angle, zoom, shear, (SHIFT * s[:, 3], SHIFT * s[:, 4]), warp)

    contrast = CONTRAST + (1 - CONTRAST) * u[:, LIGHT[0]]
    middle = contrast / 2 + (1 - contrast) * u[:, LIGHT[1]]
    ink, paper = (
        _rounded(255 * (grey[:, None] + style.tint * signed[:, tint]), 1)
        for grey, tint in ((middle - contrast / 2, INK), (middle + contrast / 2, PAPER))
    )
    image = np.broadcast_to(paper, (len(cells), 3, SIZE, SIZE))
    if style.texture:
        amplitude = style.texture * (0.5 + 0.5 * u[:, TEXTURE][:, :1])
        colour = _rounded(255 * amplitude * signed[:, TEXTURE][:, 1:], 1)
        image = image + (colour * _field(signed[:, FIELD], 1)[:, None] >> 8)
    other = u[:, OTHER]
    second = jittered(any_cell(other[:, 0], other[:, 1]), 2 * other[:, 2:] - 1, STYLES["plain"])
    image = _printed(image, second, ink, SECOND)
    if style.fragment:
        row, face, place, far, turn = u[:, FRAGMENT].T
        angle, radius = 2 * np.pi * place, 12 + 4 * far
        centre = (radius * np.cos(angle), radius * np.sin(angle))
        third = _drawn(any_cell(row, face), np.pi * (2 * turn - 1), 0.8, 0.0, centre)
        image = _printed(image, third, ink)
    warp = None
    if style.warp:
        warp = (_field(signed[:, FIELD_X], style.warp), _field(signed[:, FIELD], style.warp))
    image = _printed(image, jittered(cells, signed[:, AFFINE], style, warp), ink, FIRST)
    start, strength = u[:, (FRAGMENT.stop if style.fragment else FRAGMENT.start) :].T[:2]
    grain = _grain()[(start * (BANK - SIZE * SIZE)).astype(np.int64)].reshape(-1, SIZE, SIZE)
    image = image + (grain * _rounded(255 * NOISE * strength, 1) >> 7)[:, None]
    return np.clip(image, 0, 255).astype(np.uint8)


def _split(part: str, rows: Sequence[int], per_style: int) -> Split:
    """Every class in every style, per_style times, in faces that take turns. The number of classes changes no image."""
    names, styles = tuple(STYLES), tuple(STYLES.values())
    label, style, copy = (a.reshape(-1) for a in np.indices((len(rows), len(styles), per_style), dtype=np.int64))
    row = np.asarray(rows, np.int64)[label]
    face = (copy + 5 * style + 7 * row) % len(FACES)
    cell = row * len(FACES) + face
    number = (copy * len(characters()) + row) * len(styles) + style
    ids = [
        f"{part}/{names[s]}/{FACES[f]}/{characters()[r][0]}/{i}"
        for s, f, r, i in zip(style, face, row, copy, strict=True)
    ]
    blocks = np.arange(NUMBERS // 16)  # `uniforms` gives 16 numbers for a position

    def read(indices: np.ndarray, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        pixels = np.empty((len(indices), 3, SIZE, SIZE), np.uint8)
        for s in range(len(styles)):
            where = np.flatnonzero(style[indices] == s)
            for begin in range(0, len(where), CHUNK):
                at = where[begin : begin + CHUNK]
                position = number[indices[at], None] * len(blocks) + blocks
                u = uniforms(SEEDS[part], position.reshape(-1)).reshape(len(at), NUMBERS)
                pixels[at] = render(styles[s], cell[indices[at]], u)
        images = torch.from_numpy(pixels)
        if size != SIZE and len(images):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        return images.view(-1, 3, size, size).to(device), torch.ones(len(indices), dtype=torch.bool)

    return Split(labels=label, domains=style, ids=ids, read=read)


def load(root: str | None = None, *, classes: int = 50, train_per_style: int = 12, test_per_style: int = 6) -> Dataset:
    """The data set: classes * 6 styles * (train_per_style, test_per_style) images; domains are the styles.

    Raises UserError for a root (there are no files), fewer than 2 classes or more than the characters of the
    pre-training, or sizes below 1.
    """
    if root is not None:
        raise UserError(
            f"data set 'glyphs-hard' is part of the package and reads no files; leave the data root {root} out."
        )
    known = order()[HELD_OUT:]
    if not 2 <= classes <= len(known):
        raise UserError(f"data set 'glyphs-hard' takes 2 to {len(known)} classes, not {classes}.")
    for what, value in (("train_per_style", train_per_style), ("test_per_style", test_per_style)):
        if value < 1:
            raise UserError(f"{what} of data set 'glyphs-hard' must be at least 1, not {value}.")
    rows = sorted(known[:classes])
    return Dataset(
        name="glyphs-hard",
        class_names=tuple(characters()[row][1] for row in rows),
        domain_names=tuple(STYLES),
        train=_split("train", rows, train_per_style),
        test=_split("test", rows, test_per_style),
        templates=TEMPLATES,
        flip=False,
        notes=("the embedded backbone saw the classes in pre-training, without the second glyph",),
    )
