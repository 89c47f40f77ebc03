"""Glyphs: 913 Unicode characters in twelve DejaVu faces, embedded in the package. The default data set; needs no files.

Classes are characters with their Unicode names. Domains are the font families: an unseen family is a real shift, an
unseen style hardly one. scripts/render_glyphs.py rendered the atlas. An image is one of its glyphs with random affine
jitter, blur, colours and noise. These depend only on the split's seed and the image's number, so an image is the same
at every call and in any batch; only rounding differs between devices. Images are made on the device, in batches, at
32 x 32 pixels.

Order of the classes: characters are sorted by the SHA-256 of their names, which mixes the scripts. The first `HELD_OUT`
are unknown to the embedded backbone (fastmerge.models.tiny), which was pre-trained on all others. Of these held-out
characters, 50 have names whose words all occur at least `WORD_USES` times in the pre-training names. They come first,
because a text head needs words that it knows, as in an ordinary CLIP benchmark. A data set of n classes has the first n
characters, sorted by code point.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastmerge.data.dataset import Dataset, Split
from fastmerge.errors import UserError

ASSETS = Path(__file__).parent / "assets"
SIZE = 32  # pixels of an atlas cell
FAMILIES = ("sans", "mono", "serif")
STYLES = ("regular", "bold", "oblique", "bold-oblique")
FACES = tuple(f"{family}-{style}" for family in FAMILIES for style in STYLES)  # the columns of the atlas
TEMPLATES = ("{}", "a {}", "the {}")
HELD_OUT = 100
WORD_USES = 3
SEEDS = {"train": 1, "test": 2}
CHUNK = 512  # images made at a time, so few that the intermediate floats stay in the CPU's cache


@dataclass(frozen=True)
class Jitter:
    """Ranges of uniform random values: [-x, x] unless the comment says otherwise."""

    rotation: float = 12.0  # degrees
    scale: float = 0.2  # logarithm of the zoom
    shear: float = 0.15
    shift: float = 2.5  # pixels
    blur: float = 1.0  # [0, x]: weight of the blurred glyph; the sharp glyph has the rest
    contrast: float = 0.35  # [x, 1]: difference between light paper and dark ink
    tint: float = 0.1  # added to every channel of ink and paper
    noise: float = 0.2  # [0, x]: standard deviation relative to the contrast


JITTER = Jitter()
UNIFORMS = 16  # random numbers per image


@functools.cache
def characters() -> tuple[tuple[str, str], ...]:
    """(code point such as 'U+0041', lower-case Unicode name) of every row of the atlas, in code-point order."""
    lines = (ASSETS / "glyphs.tsv").read_text(encoding="ascii").splitlines()
    return tuple((code, name) for code, name in (line.split("\t") for line in lines))


@functools.cache
def order() -> tuple[int, ...]:
    """Rows of the atlas; the first n are the classes of a data set of n classes (see the module docstring)."""
    names = [name for _, name in characters()]
    scattered = sorted(range(len(names)), key=lambda row: hashlib.sha256(names[row].encode()).digest())
    held_out, pretraining = scattered[:HELD_OUT], scattered[HELD_OUT:]
    uses = Counter(word for row in pretraining for word in names[row].split())
    held_out.sort(key=lambda row: min(uses[word] for word in names[row].split()) < WORD_USES)
    return (*held_out, *pretraining)


def pretraining_rows() -> tuple[int, ...]:
    """Rows of the atlas that the embedded backbone was pre-trained on, in code-point order."""
    return tuple(sorted(order()[HELD_OUT:]))


@functools.cache
def atlas() -> np.ndarray:
    """[characters, faces, 32, 32] uint8 coverage, ink is 255. Read-only."""
    image = np.asarray(Image.open(ASSETS / "glyphs.png"))
    cells = image.reshape(len(characters()), SIZE, len(FACES), SIZE).transpose(0, 2, 1, 3)
    cells = np.ascontiguousarray(cells)
    cells.flags.writeable = False
    return cells


@functools.lru_cache(maxsize=4)
def _on(device: torch.device) -> tuple[Tensor, Tensor]:
    """The atlas [characters * faces, 32, 32] uint8, and a bank of normals [65536] float32 that supplies the noise."""
    # RandomState is the one numpy generator whose normals never change between versions.
    bank = torch.from_numpy(np.random.RandomState(0).standard_normal(1 << 16).astype(np.float32))
    return torch.tensor(atlas()).view(-1, SIZE, SIZE).to(device), bank.to(device)


def _blur(glyph: Tensor) -> Tensor:
    """[1 4 6 4 1] / 16 in both directions, for [k, 32, 32]. The outer two pixels hold no ink, so nothing wraps."""
    for dim in (1, 2, 1, 2):
        glyph = torch.lerp(glyph.roll(1, dim).add_(glyph.roll(-1, dim)).mul_(0.5), glyph, 0.5)
    return glyph


def uniforms(seed: int, index: np.ndarray) -> np.ndarray:
    """[k, UNIFORMS] float64 in [0, 1): SplitMix64 at position index * UNIFORMS + j of the stream `seed`."""

    def mix(z):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    position = index.astype(np.uint64)[:, None] * np.uint64(UNIFORMS) + np.arange(1, UNIFORMS + 1, dtype=np.uint64)
    start = mix(np.full(1, seed, np.uint64) + np.uint64(0x632BE59BD9B4E019))
    return (mix(start + position * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)) * 2.0**-53


def render(cells: np.ndarray, u: np.ndarray, device: torch.device, jitter: Jitter = JITTER, size: int = SIZE) -> Tensor:
    """Images uint8 [k, 3, size, size] of the cells [k] (atlas row * 12 + face), jittered by u [k, UNIFORMS]."""
    chunks = (slice(i, i + CHUNK) for i in range(0, max(1, len(cells)), CHUNK))
    return torch.cat([_render(cells[chunk], u[chunk], device, jitter, size) for chunk in chunks])


def _render(cells: np.ndarray, u: np.ndarray, device: torch.device, jitter: Jitter, size: int) -> Tensor:
    cells_on_device, bank = _on(device)
    signed = 2 * u - 1
    angle, zoom = np.deg2rad(jitter.rotation) * signed[:, 0], np.exp(jitter.scale * signed[:, 1])
    shear, shift = jitter.shear * signed[:, 2], jitter.shift * 2 / SIZE * signed[:, 3:5]
    contrast = jitter.contrast + (1 - jitter.contrast) * u[:, 5]
    middle = contrast / 2 + (1 - contrast) * u[:, 6]
    ink = (middle - contrast / 2)[:, None] + jitter.tint * signed[:, 8:11]
    paper = (middle + contrast / 2)[:, None] + jitter.tint * signed[:, 11:14]
    blur, noise = jitter.blur * u[:, 14], jitter.noise * u[:, 15]
    window = (u[:, 7] * (len(bank) - SIZE * SIZE)).astype(np.int64)  # start in the noise bank

    # Map a pixel of the image to the atlas: undo shift, rotation, scale, shear. All products are written out, because
    # a batched matrix product may round differently for another batch size.
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    matrix = np.stack([cos + shear * sin, sin - shear * cos, cos, -sin], 1)  # x from x, x from y; y from y, y from x
    numbers = np.concatenate([matrix, shift, blur[:, None], noise[:, None], paper * 255, (ink - paper) * 255], 1)
    xx, xy, yy, yx, dx, dy, blur_t, noise_t, *colours = (
        torch.from_numpy(numbers.astype(np.float32)).to(device).T[:, :, None, None].unbind()
    )
    sharp = cells_on_device[torch.from_numpy(cells).to(device)].float().div_(255)  # [k, 32, 32]
    glyph = torch.lerp(sharp, _blur(sharp), blur_t)
    centres = (torch.arange(SIZE, device=device, dtype=torch.float32) * 2 + 1) / SIZE - 1
    x, y = centres - dx, centres[:, None] - dy  # [k, 1, 32], [k, 32, 1]
    grid = torch.stack([xx * x + xy * y, yx * x + yy * y], -1)
    coverage = F.grid_sample(glyph[:, None], grid, align_corners=False)[:, 0]
    normals = bank.unfold(0, SIZE * SIZE, 1)[torch.from_numpy(window).to(device)].view(-1, SIZE, SIZE)
    coverage = torch.addcmul(coverage, noise_t, normals)
    paper_t, ink_t = torch.stack(colours[:3], 1), torch.stack(colours[3:], 1)  # [k, 3, 1, 1]
    images = torch.addcmul(paper_t, ink_t, coverage[:, None])
    if size != SIZE:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return images.add_(0.5).clamp_(0, 255.5).to(torch.uint8)


def _split(part: str, rows: Sequence[int], per_face: int) -> Split:
    """Every class in every face, per_face times. The number of classes does not change an image."""
    n_faces = len(FACES)
    label, face, copy = (a.reshape(-1) for a in np.indices((len(rows), n_faces, per_face), dtype=np.int64))
    cell = np.asarray(rows, np.int64)[label] * n_faces + face
    number = copy * len(characters()) * n_faces + cell  # does not depend on the other classes or copies
    codes = [characters()[row][0] for row in rows]
    ids = [f"{part}/{FACES[f]}/{codes[c]}/{i}" for c, f, i in zip(label, face, copy, strict=True)]
    seed = SEEDS[part]

    def read(indices: np.ndarray, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        images = render(cell[indices], uniforms(seed, number[indices]), torch.device(device), JITTER, size)
        return images, torch.ones(len(indices), dtype=torch.bool)

    return Split(labels=label, domains=face // len(STYLES), ids=ids, read=read, on_device=True)


def load(root: str | None = None, *, classes: int = 50, train_per_face: int = 6, test_per_face: int = 3) -> Dataset:
    """The glyphs data set: classes * 12 faces * (train_per_face, test_per_face) images; domains sans, mono, serif.

    Raises UserError for a root (there are no files), fewer than 2 classes or more than characters, or sizes below 1.
    """
    if root is not None:
        raise UserError(f"data set 'glyphs' is part of the package and reads no files; leave the data root {root} out.")
    if not 2 <= classes <= len(characters()):
        raise UserError(f"data set 'glyphs' takes 2 to {len(characters())} classes, not {classes}.")
    for what, value in (("train_per_face", train_per_face), ("test_per_face", test_per_face)):
        if value < 1:
            raise UserError(f"{what} of data set 'glyphs' must be at least 1, not {value}.")
    rows = sorted(order()[:classes])
    overlap = max(0, classes - HELD_OUT)
    return Dataset(
        name="glyphs",
        class_names=tuple(characters()[row][1] for row in rows),
        domain_names=FAMILIES,
        train=_split("train", rows, train_per_face),
        test=_split("test", rows, test_per_face),
        templates=TEMPLATES,
        flip=False,
        notes=(f"{overlap} of the classes were seen in pre-training of the embedded backbone",) if overlap else (),
    )
