"""Decoding. Oracles: torchvision's Resize + CenterCrop, and colours known by construction.

pytest tests/test_data_files.py
"""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from image_trees import write_image
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from fastmerge.data.files import decode, listing, square
from fastmerge.errors import UserError


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (50, 50), (400, 300), (1000, 40)])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_agrees_with_torchvision(tmp_path, size, suffix):
    path = write_image(tmp_path / f"x{suffix}", 3, size)
    transform = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32)])
    expected = np.asarray(transform(Image.open(path).convert("RGB"))).astype(int)
    difference = np.abs(decode(str(path), 32).astype(int) - expected)
    # Differences come from half a pixel of crop position and from shrinking in the DCT; the image spans 0..255.
    assert difference.mean() < 2.5, difference.mean()


def test_a_square_of_the_right_size_is_left_alone(tmp_path):
    path = write_image(tmp_path / "x.png", 5, (32, 32))
    assert np.array_equal(decode(str(path), 32), np.asarray(Image.open(path)))


RED = (200, 30, 40)


def solid(mode: str) -> Image.Image:
    return Image.new("RGB", (9, 9), RED).convert(mode)


def test_colour_modes(tmp_path):
    def pixel(image: Image.Image, suffix: str = ".png") -> tuple[int, ...]:
        path = tmp_path / f"x{suffix}"
        image.save(path)
        pixels = decode(str(path), 4)
        assert pixels.shape == (4, 4, 3) and (pixels == pixels[0, 0]).all()
        return tuple(int(v) for v in pixels[0, 0])

    grey = solid("L").getpixel((0, 0))
    assert pixel(solid("L")) == (grey,) * 3
    assert pixel(solid("RGB").quantize(2)) == RED
    assert pixel(solid("CMYK"), ".tif") == pytest.approx(RED, abs=2)
    assert pixel(Image.new("RGBA", (9, 9), (*RED, 0))) == (255, 255, 255)  # transparent pixels become white
    assert pixel(Image.new("RGBA", (9, 9), (*RED, 255))) == RED
    assert pixel(Image.new("LA", (9, 9), (0, 127))) == pytest.approx((128,) * 3, abs=1)
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.info["transparency"] = 1
    assert pixel(palette) == (255, 255, 255)
    for value in (300, 40000, 65535):  # 16 bits are divided by 257, neither clipped nor stretched
        for suffix in (".png", ".tif"):
            assert pixel(Image.fromarray(np.full((9, 9), value, np.uint16)), suffix) == (round(value / 257),) * 3
    assert pixel(Image.new("1", (9, 9), 1)) == (255, 255, 255)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_of_unknown_range_are_refused(kind, tmp_path):
    """A float image in 0..1 would be black, and so would integers in 0..255."""
    Image.fromarray(np.ones((9, 9), kind)).save(tmp_path / "x.tif")
    for image in (str(tmp_path / "x.tif"), None):
        with pytest.raises(
            ValueError, match=r"its values are (floats|32-bit integers) of unknown range; convert it to 8"
        ):
            decode(image, 4) if image else square(Image.fromarray(np.ones((9, 9), kind)), 4)
    (tmp_path / "x.pgm").write_bytes(b"P5 2 2 65535\n" + np.full(4, 40000, ">u2").tobytes())  # mode I, of 16 bits
    assert (decode(str(tmp_path / "x.pgm"), 2) == round(40000 / 257)).all()


@pytest.mark.parametrize("packed, grey", [(b"\xff\xff\xff", 255), (b"\x80\x08\x00", 128), (b"\x01\x00\x10", 1)])
def test_a_12_bit_tiff_has_its_own_range(packed, grey):
    """Two pixels in three bytes; 4095 is white."""
    pixels = packed * 8
    tags = {256: 4, 257: 4, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 12 * 9 + 4, 277: 1, 278: 4, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    file = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels
    assert (decode(io.BytesIO(file), 4) == grey).all()


def test_folder_that_cannot_be_listed_is_named(tmp_path):
    with pytest.raises(UserError, match=f"cannot list folder {tmp_path}/gone: No such file"):
        listing(str(tmp_path / "gone"))


def test_exif_rotation_is_ignored(tmp_path):
    image = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 2, 0)).resize((16, 16), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image.save(tmp_path / "x.png", exif=exif)
    pixels = decode(str(tmp_path / "x.png"), 16)
    assert (pixels[:, 0] == 0).all() and (pixels[:, -1] == 255).all()
