"""What bytes are that are no readable image, and how to send or store the image instead."""

from __future__ import annotations

import re

from fedvit.errors import DataError

SEND = "Send the bytes of one image file as the whole body, such as `curl --data-binary @image.jpg URL`."
_PNG_WITHOUT_LINE_BREAKS = b"\x89PNG\x1a"
_JPEG = b"\xff\xd8\xff"
# Possessive, so that no content takes more than linear time.
_BASE64 = re.compile(rb"[A-Za-z0-9+/_\-\r\n]{16,}+={0,2}[\r\n]*+")
# Far fewer JPEG files of this length than one in a million are without line breaks.
_LONG = 4000
_OTHER_FILES = (
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "zip"),
    (b"\x1f\x8b", "gzip"),
    (b"version https://git-lfs", "Git LFS pointer, whose image was not fetched"),
    (b"<", "HTML, XML or SVG text"),
)
_HEIF_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1"})


def not_an_image(content: bytes, image_size: int, formats: str) -> DataError:
    """The error for content that no decoder recognises; it names what the content seems to be.

    Args:
        content: not empty.
        image_size: side of the images in pixels, by which arrays of raw pixels are recognised.
        formats: what is read, for the message.
    """
    if wrapping := _wrapping(content, image_size):
        return DataError(f"The {len(content)} bytes given are {wrapping}, not an image file.", cure=SEND)
    cure = f"Give one of {formats}."
    start = content[:64].lstrip()
    kind = next((name for magic, name in _OTHER_FILES if start.startswith(magic)), None)
    if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS:
        kind = "AVIF or HEIC"
    if kind is None:
        return DataError(f"The {len(content)} bytes given are no image that can be read.", cure=cure)
    return DataError(f"The {len(content)} bytes given are a file of another kind: {kind}.", cure=cure)


def without_line_breaks(content: bytes) -> bool:
    """Whether this is an image that lost its line breaks, as the body of ``curl -d @image`` does."""
    if content.startswith(_PNG_WITHOUT_LINE_BREAKS):
        return True
    return content.startswith(_JPEG) and len(content) >= _LONG and b"\n" not in content and b"\r" not in content


def _wrapping(content: bytes, image_size: int) -> str | None:
    """What an upload wraps an image in; None if it is not known."""
    start = content[:1024].lstrip()
    if without_line_breaks(content):
        return "an image without its line breaks, as `curl -d` sends it"
    if start.startswith(b"--") and b"content-disposition" in start.lower():
        return "a multipart form"
    if start.startswith((b"{", b"[", b'"')):
        return "JSON"
    if start.startswith(b"data:"):
        return "a data URL"
    if start.startswith(b"\x93NUMPY"):
        return "a NumPy array"
    if _BASE64.fullmatch(content):
        return "Base64 text"
    if len(content) in (3 * image_size**2, 12 * image_size**2):
        return "as many as an array of pixels has"
    return None
