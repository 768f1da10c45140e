"""Reading and decoding of image files, with errors that name the file and the reason."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError


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
        return f"cannot read image {self.path}: {self.cause}"


def read_file(path: str) -> bytes:
    """Reads a whole file.

    Raises:
        BadImageError: the file cannot be opened or read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImageError(path, f"{type(error).__name__}: {error}") from error


def read_image(path: str) -> Image.Image:
    """Reads and decodes an image file; see `decode_image`."""
    return decode_image(read_file(path), path)


def decode_image(content: bytes, name: str) -> Image.Image:
    """Decodes an image to RGB; ignores the EXIF orientation, as timm does.

    Args:
        content: content of the image file.
        name: name of the file, for the error.

    Raises:
        BadImageError: the content is not an image, or is truncated.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith("I"):
                # For 16-bit grey Pillow's convert would clip all values above 255 to white.
                grey = np.clip(np.asarray(image), 0, 65535) // 256
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except UnidentifiedImageError as error:
        size = len(content)
        cause = "the file is empty" if size == 0 else f"not a known image format ({size} bytes)"
        raise BadImageError(name, cause) from error
    # Pillow's decoders raise SyntaxError, struct.error, zlib.error, IndexError and others.
    except Exception as error:
        raise BadImageError(name, f"{type(error).__name__}: {error}") from error
