"""What DALI is given of an image file: its content, if DALI decodes that as Pillow would."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from PIL import Image

from featkd.data.images import decode_image

File = tuple[np.ndarray[Any, Any], tuple[int, int]]
"""Content, (width, height)."""

_START, _END = b"\xff\xd8", 0xD9
_SCAN, _TABLES, _RESTARTS = 0xDA, 0xDB, 0xDD
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive, with Huffman codes
# Within a scan a 0xff of the data is followed by 0; restart markers come where they are declared.
_AFTER_SCAN = re.compile(rb"\xff[^\x00]")
_AFTER_SCAN_WITH_RESTARTS = re.compile(rb"\xff[^\x00\xd0-\xd7]")


def load(content: bytes, name: str) -> File:
    """A file as DALI decodes it to Pillow's pixels: as it is, or the pixels as a PNG.

    Args:
        content: of the file.
        name: of the file, for the message.

    Raises:
        BadImageError: it is no image, or is cut off.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            size = image.size
    except Exception:
        decode_image(content, name)  # says what is wrong with it
        raise
    if plain and is_whole_jpeg(content):
        return np.frombuffer(content, dtype=np.uint8), size
    # CMYK, 16 bits, palettes, damage: the rules are decode_image's
    rgb = decode_image(content, name)
    return as_png(rgb), rgb.size


def load_decodable(content: bytes, name: str) -> File:
    """`load` of a file that Pillow decodes to its end, which takes as long as DALI's decoding.

    Raises:
        BadImageError: Pillow does not.
    """
    decode_image(content, name)
    return load(content, name)


def is_whole_jpeg(content: bytes) -> bool:
    """Whether a JPEG's segments lead from its first byte to its end marker, none missing.

    Decoders fill with grey what a damaged scan has lost, and only some of them say so. This reads
    headers alone, and looks in a scan for markers that belong to none: a few per cent of the time
    that decoding takes.
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
        if length < 2:  # its own two bytes
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
    """The content of a file that every decoder reads to the image's own pixels."""
    written = io.BytesIO()
    image.save(written, "PNG", compress_level=0, icc_profile=None)
    return np.frombuffer(written.getvalue(), dtype=np.uint8)
