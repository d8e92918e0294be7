"""From records to one array of pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedvit.data.records import ImageSource, Record
from fedvit.errors import DataError
from fedvit.types import ImageArray
from fedvit.wire.images import decode_image


def load_images(source: ImageSource, records: Sequence[Record], image_size: int) -> ImageArray:
    """Decode and resize the images of ``records``, in order: shape (N, image_size, image_size, 3), uint8 RGB.

    Raises:
        DataError: an image cannot be read or decoded; the message names its key.
    """
    images = np.empty((len(records), image_size, image_size, 3), dtype=np.uint8)
    for i, record in enumerate(records):
        content = source.read(record)
        try:
            images[i] = decode_image(content, image_size)
        except DataError as error:
            raise DataError(f"{record.key} of {source.name}: {error.message}", cure=error.cure) from error
    return images
