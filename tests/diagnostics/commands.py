"""`featkd diagnose` with quick settings, features to run it on, and what a run found."""

from __future__ import annotations

import json
import shutil

import numpy as np

QUICK = ("--sample", "5", "--permuted", "3", "--permutations", "5", "--k", "3")


def arguments(features, out, *more):
    words = ("diagnose", "--features", features, "--out", out, "--batch-size", "4", *QUICK, *more)
    return [str(word) for word in words]


def figures(out):
    """What must not depend on how a run went."""
    summary = json.loads((out / "summary.json").read_text())
    for name in ("about", "images_per_s"):
        del summary[name]
    return summary, (out / "per_image.safetensors").read_bytes(), (out / "curves.csv").read_text()


def spoiled(features, folder, name, count=None, at=(0, 7, 3), value=np.nan):
    """The first `count` files in another folder, `name` with a number that is none."""
    folder.mkdir()
    for path in sorted(features.glob("*.npy"))[:count]:
        shutil.copy(path, folder)
    m = np.load(folder / name)
    m[at] = value
    np.save(folder / name, m)
    return folder
