"""Image decoder shared by training, evaluation and the edge, so that all see the same pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from fedvit.errors import DataError
from fedvit.types import ImageArray
from fedvit.wire.content import not_an_image, without_line_breaks

MAX_IMAGE_BYTES = 10 * 2**20
"""Most bytes of an image that a server is sent; files of a data set may be larger."""
MAX_IMAGE_PIXELS = 50_000_000
# Pillow's other decoders are not exposed to untrusted images.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
)
_CURE = f"Send one of {', '.join(FORMATS)}."
_BACKGROUND = (255, 255, 255)
_MAX_UINT16 = 65535


def decode_image(content: bytes, image_size: int, max_bytes: int | None = MAX_IMAGE_BYTES) -> ImageArray:
    """Decode, turn upright by EXIF, convert as :func:`to_rgb` does, and resize bilinearly.

    Args:
        content: the image file.
        image_size: side of the result, in pixels.
        max_bytes: most bytes that are decoded; None sets no limit, for files that nobody sends.

    Returns:
        uint8 [image_size, image_size, 3].

    Raises:
        DataError: the content is empty, over ``max_bytes`` or ``MAX_IMAGE_PIXELS``, not a whole image, or has values
            that :func:`to_rgb` refuses.
    """
    if not content:
        raise DataError("The image is empty: 0 bytes.", cure=_CURE)
    if max_bytes is not None and len(content) > max_bytes:
        raise DataError(
            f"The image has {len(content)} bytes; at most {max_bytes} are read.", cure="Send a smaller one."
        )
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_pixels(image)
            upright = to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise not_an_image(content, image_size, ", ".join(FORMATS)) from None
    except Image.DecompressionBombError:
        raise DataError(f"The image has more than {MAX_IMAGE_PIXELS} pixels.", cure="Send a smaller one.") from None
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others.
        if without_line_breaks(content):
            raise not_an_image(content, image_size, ", ".join(FORMATS)) from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"The image is damaged: {reason}.", cure="Send a whole image file.") from None
    resized = upright.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.array(resized, dtype=np.uint8)


def sendable_image(content: bytes, image_size: int) -> bytes:
    """An image file that a server takes and that decodes to the same pixels: ``content`` itself, or a smaller PNG.

    Raises:
        DataError: ``content`` is too large for a server, and no image.
    """
    if len(content) <= MAX_IMAGE_BYTES:
        return content
    buffer = io.BytesIO()
    Image.fromarray(decode_image(content, image_size, max_bytes=None)).save(buffer, format="PNG")
    return buffer.getvalue()


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB.

    Transparent parts show a white background. Grey values of 16 bits are divided by 257, and floating-point values are
    multiplied by 255; Pillow's own conversion would cut both off at 255.

    Raises:
        DataError: an integer value is not in [0, 65535], or a floating-point value not in [0, 1].
    """
    if image.mode.startswith(("I", "F")):
        # Transparency of 16-bit grey is a single grey value, which Pillow does not convert.
        transparent = image.info.get("transparency")
        values = np.asarray(image)
        grey = Image.fromarray(_as_uint8(values))
        if not isinstance(transparent, int):
            return grey.convert("RGB")
        return _composited(grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        return _composited(whole, whole.getchannel("A"))
    return image.convert("RGB")


def _composited(image: Image.Image, alpha: Image.Image) -> Image.Image:
    background = Image.new("RGB", image.size, _BACKGROUND)
    background.paste(image.convert("RGB"), mask=alpha)
    return background


def _as_uint8(values: npt.NDArray[Any]) -> ImageArray:
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        # A comparison with NaN is false.
        if not (low >= 0 and high <= 1):
            raise DataError(
                f"The image has floating-point values from {low:g} to {high:g}.", cure="Scale them to the range 0 to 1."
            )
        return np.asarray(np.rint(values * 255), dtype=np.uint8)
    if low < 0 or high > _MAX_UINT16:
        raise DataError(
            f"The image has values from {low:.0f} to {high:.0f}.", cure=f"Scale them to the range 0 to {_MAX_UINT16}."
        )
    return np.asarray(np.rint(values / 257), dtype=np.uint8)


def _check_pixels(image: Image.Image) -> None:
    """Check the size in the header before anything is decompressed."""
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise DataError(
            f"The image has {width} x {height} pixels; at most {MAX_IMAGE_PIXELS} are decoded.",
            cure="Send a smaller one.",
        )
