"""Render the characters of the `glyphs` data set into the atlas that the package ships.

    python scripts/render_glyphs.py                # about 30 s; rewrites fastmerge/data/assets/glyphs*

Why pre-rendered: FreeType and the fonts change between versions, the pixels of a benchmark must not. The shipped files
came from matplotlib 3.11.2 (DejaVu 2.37), Pillow 13.0.0 (FreeType 2.14.3), Unicode 14.0 names.

A character is kept if all twelve faces have it, it has a Unicode name, leaves ink, and in *every* face differs from each
character kept before it (greedy, in code point order) by more than 0.1 in

    d(a, b) = min over shifts s of at most one pixel in x and y of  |a - s(b)|^2 / (|a|^2 + |b|^2)

Of 2383 named characters in all faces, 913 remain.

Files: glyphs.png, grey, 64 levels, one character a row and one face a column, 32x32 pixels each, ink is white;
glyphs.tsv, code point and lower-case name of every row; glyphs-font-licence.txt, the licence of the fonts.
"""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
ASSETS = Path(__file__).parents[1] / "fastmerge" / "data" / "assets"
FACES = [
    family + style
    for family, slant in (("DejaVuSans", "Oblique"), ("DejaVuSansMono", "Oblique"), ("DejaVuSerif", "Italic"))
    for style in ("", "-Bold", f"-{slant}", f"-Bold{slant}")
]
SIZE = 32  # pixels
EM = 24  # font size in pixels; characters larger than LIMIT are set smaller until they fit
LIMIT = 28
OVERSAMPLE = 4
LEVELS = 64
DISTANCE = 0.1
MIN_INK = 4.0  # sum of coverage in pixels, in the face with least


def render(face: str, codes: list[int]) -> np.ndarray:
    """[n, SIZE, SIZE] uint8: each character drawn oversampled, its ink centred, averaged down."""
    fonts: dict[int, ImageFont.FreeTypeFont] = {}
    side = 4 * SIZE * OVERSAMPLE
    out = np.zeros((len(codes), SIZE, SIZE), np.uint8)
    for i, code in enumerate(codes):
        for em in range(EM * OVERSAMPLE, 0, -2):
            if em not in fonts:
                fonts[em] = ImageFont.truetype(FONTS / f"{face}.ttf", em, layout_engine=ImageFont.Layout.BASIC)
            canvas = Image.new("L", (side, side))
            ImageDraw.Draw(canvas).text((side // 2, side // 2), chr(code), fill=255, font=fonts[em], anchor="ls")
            box = canvas.getbbox()
            if box is None or max(box[2] - box[0], box[3] - box[1]) <= LIMIT * OVERSAMPLE:
                break
        if box is None:
            continue
        x, y = (box[0] + box[2] - SIZE * OVERSAMPLE) // 2, (box[1] + box[3] - SIZE * OVERSAMPLE) // 2
        cut = np.asarray(canvas.crop((x, y, x + SIZE * OVERSAMPLE, y + SIZE * OVERSAMPLE)), np.float32)
        out[i] = cut.reshape(SIZE, OVERSAMPLE, SIZE, OVERSAMPLE).mean((1, 3)).round()
    return out


def distances(glyphs: np.ndarray) -> np.ndarray:
    """[n, n] for glyphs [n, SIZE, SIZE]: the shift-tolerant relative squared distance d of the module docstring."""
    a = glyphs.astype(np.float32) / 255
    flat = a.reshape(len(a), -1)
    padded = np.pad(a, ((0, 0), (1, 1), (1, 1)))
    overlap = np.zeros((len(a), len(a)), np.float32)
    for y in range(3):
        for x in range(3):
            np.maximum(overlap, flat @ padded[:, y : y + SIZE, x : x + SIZE].reshape(len(a), -1).T, out=overlap)
    overlap = np.maximum(overlap, overlap.T)
    energy = (flat**2).sum(1)
    total = energy[:, None] + energy[None]
    return (total - 2 * overlap) / total


def main() -> None:
    common = set.intersection(*(set(FT2Font(str(FONTS / f"{face}.ttf")).get_charmap()) for face in FACES))
    codes = [code for code in sorted(common) if unicodedata.name(chr(code), "")]
    glyphs = np.stack([render(face, codes) for face in FACES], 1)  # [n, faces, SIZE, SIZE]
    inked = np.flatnonzero((glyphs / 255.0).sum((2, 3)).min(1) > MIN_INK)
    closest = np.min([distances(glyphs[inked, f]) for f in range(len(FACES))], 0)
    kept: list[int] = []
    for i in range(len(inked)):
        if not kept or closest[i, kept].min() > DISTANCE:
            kept.append(i)
    rows = inked[kept]
    print(f"{len(codes)} named characters in all faces, {len(rows)} differ visibly in every face")

    atlas = np.round(glyphs[rows] / 255 * (LEVELS - 1)) * (255 / (LEVELS - 1))
    atlas = atlas.round().astype(np.uint8).transpose(0, 2, 1, 3).reshape(len(rows) * SIZE, len(FACES) * SIZE)
    Image.fromarray(atlas).save(ASSETS / "glyphs.png", optimize=True)
    lines = [f"U+{codes[i]:04X}\t{unicodedata.name(chr(codes[i])).lower()}\n" for i in rows]
    (ASSETS / "glyphs.tsv").write_text("".join(lines))
    shutil.copyfile(FONTS / "LICENSE_DEJAVU", ASSETS / "glyphs-font-licence.txt")


if __name__ == "__main__":
    main()
