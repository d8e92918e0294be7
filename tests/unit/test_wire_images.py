from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from raises import raises_naming
from tiny_release import png

from fedvit.errors import DataError
from fedvit.wire.images import MAX_IMAGE_BYTES, decode_image, sendable_image, to_rgb


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises many pixels and holds none."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM"])
def test_lossless_formats_keep_their_colours(kind: str) -> None:
    pixels = decode_image(encoded(Image.new("RGB", (40, 30), (10, 200, 30)), kind), 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == (10, 200, 30)).all()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_come_close(kind: str) -> None:
    pixels = decode_image(encoded(Image.new("RGB", (40, 30), (10, 200, 30)), kind), 16)
    assert np.abs(pixels.astype(int) - (10, 200, 30)).max() < 10


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(Image.new(mode, (8, 8)), kind), 16).shape == (16, 16, 3)


RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_16_bit_and_floating_point_greys_are_those_of_8_bits(kind: str) -> None:
    plain = decode_image(encoded(Image.fromarray(RAMP.astype(np.uint8)), kind), 16)
    assert len(np.unique(plain)) == 256
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(RAMP * 257), kind), 16), plain)
    if kind == "PPM":
        floats = Image.fromarray((RAMP / 255).astype(np.float32))
        np.testing.assert_array_equal(decode_image(encoded(floats, kind), 16), plain)


def test_transparent_parts_show_white() -> None:
    colours = [(10, 200, 30, 255), (10, 200, 30, 0), (0, 0, 0, 51)]
    for colour, shown in zip(colours, [(10, 200, 30), (255, 255, 255), (204, 204, 204)], strict=True):
        assert (decode_image(encoded(Image.new("RGBA", (8, 8), colour), "PNG"), 16) == shown).all()
    grey, palette = Image.new("LA", (8, 8), (7, 0)), Image.new("L", (8, 8), 3).convert("P")
    deep = Image.fromarray(np.full((8, 8), 700, np.uint16))
    for image, transparent in ((grey, None), (palette, 3), (Image.new("RGB", (8, 8)), (0, 0, 0)), (deep, 700)):
        options = {} if transparent is None else {"transparency": transparent}
        assert (decode_image(encoded(image, "PNG", **options), 16) == 255).all()


@pytest.mark.parametrize(
    "value", [np.float32(1.5), np.float32(-0.1), np.float32("nan"), np.int32(70_000), np.int32(-1)]
)
def test_values_without_a_known_range_are_refused(value: np.generic) -> None:
    with pytest.raises(DataError) as raised:
        to_rgb(Image.fromarray(np.full((4, 4), value)))
    assert raised.value.cure


def test_resizing_is_bilinear_and_reproducible() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (37, 53, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode_image(encoded(image, "PNG"), 24), expected)


def test_exif_orientation_turns_the_image_upright() -> None:
    image = Image.new("RGB", (32, 32), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 3
    upside_down = decode_image(encoded(image, "PNG", exif=exif), 32)
    assert upside_down[4].max() == 0
    assert upside_down[-4].min() == 255


def test_the_pixels_can_be_written_to() -> None:
    pixels = decode_image(png(), 16)
    pixels[0, 0] = 7
    assert (pixels[0, 0] == 7).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"no image at all", "no image"),
        (b"\x89PNG not really", "no image that can be read"),
        (b"GIF89a" + bytes(100), "GIF"),
        (bytes(MAX_IMAGE_BYTES + 1), str(MAX_IMAGE_BYTES)),
        (png_header(10_000, 10_000), "10000 x 10000"),
        (png_header(100_000, 100_000), "pixels"),
        (png_header(64, 64), "damaged"),
    ],
    ids=["empty", "text", "beginning", "gif", "too long", "too many pixels", "decompression bomb", "no pixels"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_named(content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said) as raised:
        decode_image(content, 16)
    assert raised.value.cure


def test_every_truncation_is_a_data_error_or_an_image() -> None:
    rng = np.random.default_rng(1)
    whole = encoded(Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)), "JPEG")
    outcomes: set[object] = set()
    for length in range(0, len(whole), 7):
        try:
            outcomes.add(decode_image(whole[:length], 16).shape)
        except DataError:
            outcomes.add("refused")
    assert "refused" in outcomes
    assert outcomes <= {"refused", (16, 16, 3)}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"GIF89a" + bytes(100), "GIF"),
        (b"MM\0*" + bytes(100), "TIFF"),
        (b"\0\0\0 ftypheic" + bytes(100), "HEIC"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"\n<!DOCTYPE html><title>404</title>", "HTML"),
    ],
)
def test_a_file_of_another_kind_is_named(content: bytes, named: str) -> None:
    with raises_naming(DataError, named):
        decode_image(content, 16)


def test_files_of_a_data_set_may_be_larger_than_what_is_sent() -> None:
    large = png((0, 0, 255)) + bytes(MAX_IMAGE_BYTES)
    with pytest.raises(DataError):
        decode_image(large, 16)
    pixels = decode_image(large, 16, max_bytes=None)
    sent = sendable_image(large, 16)
    assert len(sent) < MAX_IMAGE_BYTES
    np.testing.assert_array_equal(decode_image(sent, 16), pixels)
    assert sendable_image(png(), 16) == png()
