"""Reading an image file, whatever its format, and saying what is wrong with one."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError


class BadImageError(RuntimeError):
    """An image file cannot be read.

    Attributes:
        path: the file.
        cause: what is wrong with it, in words.
    """

    def __init__(self, path: str, cause: str) -> None:
        # Both go into `args`, from which pickle rebuilds the exception in another process.
        super().__init__(path, cause)
        self.path = path
        self.cause = cause

    def __str__(self) -> str:
        return f"cannot read image {self.path}: {self.cause}"


def read_file(path: str) -> bytes:
    """Read a file whole.

    Raises:
        BadImageError: it cannot be opened or read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImageError(path, f"{type(error).__name__}: {error}") from error


def read_image(path: str) -> Image.Image:
    """`decode_image` of a file."""
    return decode_image(read_file(path), path)


def decode_image(content: bytes, name: str) -> Image.Image:
    """Decode a file's content to an RGB image (EXIF orientation ignored, as timm does).

    Args:
        content: of the file.
        name: of the file, for the message.

    Raises:
        BadImageError: it is no image, or is cut off.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith("I"):
                # 16-bit grey. Pillow's convert would clip everything above 255 to white.
                grey = np.clip(np.asarray(image), 0, 65535) // 256
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except UnidentifiedImageError as error:
        size = len(content)
        cause = "the file is empty" if size == 0 else f"not a known image format ({size} bytes)"
        raise BadImageError(name, cause) from error
    # Pillow's decoders raise SyntaxError, struct.error, zlib.error, IndexError and more.
    except Exception as error:
        raise BadImageError(name, f"{type(error).__name__}: {error}") from error
