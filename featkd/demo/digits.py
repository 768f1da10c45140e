"""scikit-learn's digits (1,797 real 8 x 8 scans of handwriting) as a folder of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

VALIDATION = 360


def write_digits(folder: Path) -> None:
    """Writes the digits as `folder/{train,val}/<digit>/<number>.png`, unless they exist.

    The split is fixed and stratified: 1,437 training and 360 validation images. The images are the
    test part of [Alpaydin and Kaynak, UCI ML repository, 1998], with values 0..16 scaled to
    0..255.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    done = folder / "complete"
    if done.exists():
        return
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the demo needs scikit-learn: pip install '/path/to/featkd[demo]'"
        ) from error
    digits = load_digits()
    numbers = np.arange(len(digits.target))
    train, val = train_test_split(
        numbers, test_size=VALIDATION, random_state=0, stratify=digits.target
    )
    for split, chosen in (("train", train), ("val", val)):
        for number in chosen:
            place = folder / split / str(digits.target[number])
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.round(digits.images[number] * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{number:04d}.png")
    done.touch()
