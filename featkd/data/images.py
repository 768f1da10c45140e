"""Reading and decoding of image files, with errors that name the file and the reason."""

from __future__ import annotations

import io
from shutil import SpecialFileError

import numpy as np
from PIL import Image, UnidentifiedImageError

from featkd.runtime.files import open_regular
from featkd.runtime.names import printable

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read, whatever the ending of the file.

Pillow knows others that start programs (Ghostscript for PostScript) or open further files.
"""


class BadImageError(RuntimeError):
    """An image file cannot be read.

    Attributes:
        path: the file.
        cause: the reason, in words.
    """

    def __init__(self, path: str, cause: str) -> None:
        # pickle rebuilds the exception in another process from `args`, so they hold both.
        super().__init__(path, cause)
        self.path = path
        self.cause = cause

    def __str__(self) -> str:
        return f"cannot read image {printable(self.path)}: {printable(self.cause)}"


def read_file(path: str) -> bytes:
    """Reads a whole file.

    Raises:
        BadImageError: the file cannot be opened or read, or is not a regular file.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        kind = "" if isinstance(error, SpecialFileError) else f"{type(error).__name__}: "
        raise BadImageError(path, f"{kind}{error}") from error


def read_image(path: str) -> Image.Image:
    """Reads and decodes an image file; see `decode_image`."""
    return decode_image(read_file(path), path)


def open_image(content: bytes) -> Image.Image:
    """Opens an image in one of IMAGE_FORMATS with Pillow, without decoding its pixels.

    Raises:
        UnidentifiedImageError: the content is in no such format.
    """
    return Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)


def decode_image(content: bytes, name: str) -> Image.Image:
    """Decodes an image to RGB; ignores the EXIF orientation, as timm does.

    Args:
        content: content of the image file.
        name: name of the file, for the error.

    Raises:
        BadImageError: the content is not an image of a supported format, is truncated, or has
            numbers without a fixed range as pixels.
    """
    try:
        with open_image(content) as image:
            mode = image.mode
            # A TIFF in mode I has signed or 32-bit integers. Other files in mode I have 16 bits.
            if mode != "F" and not (mode == "I" and image.format == "TIFF"):
                if mode.startswith("I"):
                    # For 16-bit grey Pillow's convert would clip all values above 255 to white.
                    grey = np.clip(np.asarray(image), 0, 65535) // 256
                    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
                rgb: Image.Image = image.convert("RGB")
                return rgb
    except UnidentifiedImageError as error:
        size, allowed = len(content), ", ".join(IMAGE_FORMATS)
        cause = f"no image of a supported format ({size} bytes; supported: {allowed})"
        raise BadImageError(name, cause if size else "the file is empty") from error
    # Pillow's decoders raise SyntaxError, struct.error, zlib.error, IndexError and others.
    except Exception as error:
        raise BadImageError(name, f"{type(error).__name__}: {error}") from error
    kind = "floating-point" if mode == "F" else "signed or 32-bit integer"
    raise BadImageError(
        name,
        f"{kind} pixels, whose black and white are not defined; expected 8-bit or unsigned 16-bit "
        "pixels; convert the file",
    )
