"""Image files in a form that DALI decodes to the same pixels as Pillow."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featkd.data.images import decode_image, open_image

File = tuple[np.ndarray[Any, Any], tuple[int, int]]
"""Content and (width, height)."""

_START, _END = b"\xff\xd8", 0xD9
_SCAN, _TABLES, _RESTARTS = 0xDA, 0xDB, 0xDD
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive, with Huffman codes
_HUFFMAN, _COMMENT = 0xC4, 0xFE
_JFIF, _ADOBE = 0xE0, 0xEE
_Segment = tuple[int, memoryview]  # marker and content
_MOST_PIXELS = 1 << 26  # Pillow warns about larger images, or refuses them


def load(content: bytes, name: str) -> File:
    """Returns the file unchanged if it is an intact RGB or grey JPEG, otherwise as a PNG.

    Args:
        content: content of the image file.
        name: name of the file, for the error.

    Raises:
        BadImageError: the content is not an image, or is truncated.
    """
    segments = _segments(content)
    size = None if segments is None else _usual_size(segments)
    if size is None:  # Pillow opens every other file
        try:
            with open_image(content) as image:
                plain = image.format == "JPEG" and image.mode in ("RGB", "L")
                size = image.size
        except Exception:
            decode_image(content, name)  # raises the BadImageError
            raise
        if segments is None or not plain:
            # decode_image defines the pixels of CMYK, 16-bit, palette and damaged images
            rgb = decode_image(content, name)
            return as_png(rgb), rgb.size
    return np.frombuffer(content, dtype=np.uint8), size


def load_decodable(content: bytes, name: str) -> File:
    """Calls `load` after Pillow has decoded the whole file, which is slow.

    Raises:
        BadImageError: Pillow cannot decode it.
    """
    decode_image(content, name)
    return load(content, name)


def _segments(content: bytes) -> list[_Segment] | None:
    """Returns the segments up to the end marker; None if `content` is not a whole JPEG.

    Decoders fill lost parts of a scan with grey, and only some report it. This check reads only
    the headers and searches the scans for stray markers, so it is much faster than decoding.
    """
    if not content.startswith(_START):
        return None
    view = memoryview(content)
    found: list[_Segment] = []
    seen: set[int] = set()
    ends: NDArray[np.bool_] | None = None
    at = len(_START)
    while content[at : at + 1] == b"\xff" and at + 1 < len(content):
        code = content[at + 1]
        if code == _END:
            whole = _SCAN in seen and _TABLES in seen and not seen.isdisjoint(_FRAMES)
            return found if whole else None
        length = int.from_bytes(content[at + 2 : at + 4], "big")
        if length < 2:  # the length includes its own two bytes
            return None
        if code == _RESTARTS:
            ends = None
        seen.add(code)
        found.append((code, view[at + 4 : at + 2 + length]))
        at += 2 + length
        if code == _SCAN:
            if ends is None:
                ends = _ends_of_scans(content, restarts=_RESTARTS in seen)
            if not ends[at:].any():
                return None
            at += int(ends[at:].argmax())
    return None


def _ends_of_scans(content: bytes, *, restarts: bool) -> NDArray[np.bool_]:
    """Marks the places at which the data of a scan would end.

    In the data 0xff is followed by 0, or by a restart marker if the file declares them.
    """
    data = np.frombuffer(content, dtype=np.uint8)
    ends: NDArray[np.bool_] = data[1:] != 0
    ends &= data[:-1] == 0xFF
    if restarts:
        ends &= (data[1:] & 0xF8) != 0xD0
    return ends


def _usual_size(segments: list[_Segment]) -> tuple[int, int] | None:
    """Returns the (width, height) of an RGB or grey JPEG whose headers Pillow accepts.

    Returns None for any header of which that is not certain. Pillow takes three times as long.
    """
    size = None
    for code, content in segments:
        if code in _FRAMES:
            known = len(content) > 5 and content[0] == 8 and content[5] in (1, 3)
            if size is not None or not known or len(content) != 6 + 3 * content[5]:
                return None
            height, width = int.from_bytes(content[1:3], "big"), int.from_bytes(content[3:5], "big")
            if not 0 < width * height <= _MOST_PIXELS:
                return None
            size = width, height
        elif code == _SCAN:
            return size
        elif code == _TABLES:
            if len(content) % 65 or any(precision > 15 for precision in content[::65]):
                return None
        elif code in (_JFIF, _ADOBE):
            if len(content) < 12:
                return None
        elif code not in (_HUFFMAN, _RESTARTS, _COMMENT):
            return None
    return None


def as_png(image: Image.Image) -> np.ndarray[Any, Any]:
    """Encodes an image as an uncompressed PNG, which every decoder decodes to the same pixels."""
    written = io.BytesIO()
    image.save(written, "PNG", compress_level=0, icc_profile=None)
    return np.frombuffer(written.getvalue(), dtype=np.uint8)
