"""Image files in a form that DALI decodes to the same pixels as Pillow."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from PIL import Image

from featkd.data.images import decode_image, open_image

File = tuple[np.ndarray[Any, Any], tuple[int, int]]
"""Content and (width, height)."""

_START, _END = b"\xff\xd8", 0xD9
_SCAN, _TABLES, _RESTARTS = 0xDA, 0xDB, 0xDD
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive, with Huffman codes
# In the data of a scan, 0xff is followed by 0, or by a restart marker if the file declares them.
_AFTER_SCAN = re.compile(rb"\xff[^\x00]")
_AFTER_SCAN_WITH_RESTARTS = re.compile(rb"\xff[^\x00\xd0-\xd7]")


def load(content: bytes, name: str) -> File:
    """Returns the file unchanged if it is an intact RGB or grey JPEG, otherwise as a PNG.

    Args:
        content: content of the image file.
        name: name of the file, for the error.

    Raises:
        BadImageError: the content is not an image, or is truncated.
    """
    try:
        with open_image(content) as image:
            plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            size = image.size
    except Exception:
        decode_image(content, name)  # raises the BadImageError
        raise
    if plain and is_whole_jpeg(content):
        return np.frombuffer(content, dtype=np.uint8), size
    # decode_image defines the pixels of CMYK, 16-bit, palette and damaged images
    rgb = decode_image(content, name)
    return as_png(rgb), rgb.size


def load_decodable(content: bytes, name: str) -> File:
    """Calls `load` after Pillow has decoded the whole file, which is slow.

    Raises:
        BadImageError: Pillow cannot decode it.
    """
    decode_image(content, name)
    return load(content, name)


def is_whole_jpeg(content: bytes) -> bool:
    """Checks whether a JPEG's segments are complete, from the first byte to the end marker.

    Decoders fill lost parts of a scan with grey, and only some report it. This check reads only
    the headers and searches the scans for stray markers, so it is much faster than decoding.
    """
    if not content.startswith(_START):
        return False
    seen: set[int] = set()
    at = len(_START)
    while content[at : at + 1] == b"\xff" and at + 1 < len(content):
        code = content[at + 1]
        if code == _END:
            return _SCAN in seen and _TABLES in seen and not seen.isdisjoint(_FRAMES)
        length = int.from_bytes(content[at + 2 : at + 4], "big")
        if length < 2:  # the length includes its own two bytes
            return False
        seen.add(code)
        at += 2 + length
        if code == _SCAN:
            after = _AFTER_SCAN_WITH_RESTARTS if _RESTARTS in seen else _AFTER_SCAN
            found = after.search(content, at)
            if found is None:
                return False
            at = found.start()
    return False


def as_png(image: Image.Image) -> np.ndarray[Any, Any]:
    """Encodes an image as an uncompressed PNG, which every decoder decodes to the same pixels."""
    written = io.BytesIO()
    image.save(written, "PNG", compress_level=0, icc_profile=None)
    return np.frombuffer(written.getvalue(), dtype=np.uint8)
