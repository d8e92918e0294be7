"""Image decoder shared by training, evaluation and the edge, so that all see the same pixels."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fedvit.errors import DataError
from fedvit.types import ImageArray

MAX_IMAGE_BYTES = 10 * 2**20
MAX_IMAGE_PIXELS = 50_000_000
# Pillow's other decoders are not exposed to untrusted images.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
_CURE = f"Send one of {', '.join(FORMATS)}."


def decode_image(content: bytes, image_size: int) -> ImageArray:
    """Decode, turn upright by EXIF, convert to RGB and resize bilinearly to [image_size, image_size, 3], uint8.

    Raises:
        DataError: the content is empty, over ``MAX_IMAGE_BYTES`` or ``MAX_IMAGE_PIXELS``, or not a whole image.
    """
    if not content:
        raise DataError("The image is empty: 0 bytes.", cure=_CURE)
    if len(content) > MAX_IMAGE_BYTES:
        raise DataError(
            f"The image has {len(content)} bytes; at most {MAX_IMAGE_BYTES} are read.", cure="Send a smaller one."
        )
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_pixels(image)
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise DataError(f"The {len(content)} bytes given are no image that can be read.", cure=_CURE) from None
    except Image.DecompressionBombError:
        raise DataError(f"The image has more than {MAX_IMAGE_PIXELS} pixels.", cure="Send a smaller one.") from None
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"The image is damaged: {reason}.", cure="Send a whole image file.") from None
    resized = upright.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.array(resized, dtype=np.uint8)


def _check_pixels(image: Image.Image) -> None:
    """Check the size in the header before anything is decompressed."""
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise DataError(
            f"The image has {width} x {height} pixels; at most {MAX_IMAGE_PIXELS} are decoded.",
            cure="Send a smaller one.",
        )
