"""The page of misclassified images, ``misclassified.html``: test images of the server only, never a client's."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fedvit.data.records import ImageSource, load_images
from fedvit.tools.report.html import write_html
from fedvit.types import ImageArray, LabelArray

PAGE = "misclassified.html"
MOST_IMAGES = 200
_SIZE = 96


def write_misclassified(path: Path, source: ImageSource, predictions: LabelArray, version: str) -> int:
    """Write the page to ``path``, the most frequent confusions first, and return how many images are misclassified.

    Args:
        predictions: class indices of ``source.test``, in order.

    Raises:
        DataError: an image cannot be read.
    """
    labels = np.array([record.label for record in source.test])
    wrong = np.flatnonzero(labels != predictions)
    pairs = Counter(zip(labels[wrong].tolist(), predictions[wrong].tolist(), strict=True))
    groups = []
    left = MOST_IMAGES
    for (true, predicted), count in pairs.most_common():
        chosen = [int(i) for i in wrong if (labels[i], predictions[i]) == (true, predicted)][:left]
        left -= len(chosen)
        title = f"{source.classes[true]} taken for {source.classes[predicted]}: {count:,}"
        groups.append((title, _pictures(source, chosen)))
    write_html(
        path,
        PAGE,
        title=f"fedvit: misclassified test images of {version}",
        subtitle=f"{len(wrong):,} of {len(labels):,} test images, of which at most {MOST_IMAGES} are shown. These are "
        "held-out images of the server; images of clients are never shown.",
        groups=[group for group in groups if group[1]],
    )
    return len(wrong)


def _pictures(source: ImageSource, chosen: Sequence[int]) -> list[tuple[str, str]]:
    """Key and data URI of each."""
    records = [source.test[index] for index in chosen]
    return [
        (record.key, _data_uri(pixels))
        for record, pixels in zip(records, load_images(source, records, _SIZE), strict=True)
    ]


def _data_uri(pixels: ImageArray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
