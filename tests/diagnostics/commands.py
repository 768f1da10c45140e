"""Arguments of quick `featkd diagnose` runs, bad feature files, and the figures of a run."""

from __future__ import annotations

import json
import shutil

import numpy as np

QUICK = ("--sample", "5", "--permuted", "3", "--permutations", "5", "--k", "3")


def arguments(features, out, *more):
    words = ("diagnose", "--features", features, "--out", out, "--batch-size", "4", *QUICK, *more)
    return [str(word) for word in words]


def figures(out):
    """Output that must be the same for any number of processes, restarts and callers."""
    summary = json.loads((out / "summary.json").read_text())
    for name in ("about", "images_per_s"):
        del summary[name]
    return summary, (out / "per_image.safetensors").read_bytes(), (out / "curves.csv").read_text()


def copy_with_bad_value(features, folder, name, count=None, at=(0, 7, 3), value=np.nan):
    """Copies the first `count` files to another folder and sets values of the files `name`."""
    folder.mkdir()
    for path in sorted(features.glob("*.npy"))[:count]:
        shutil.copy(path, folder)
    for path in folder.glob(name):
        m = np.load(path)
        m[at] = value
        np.save(path, m)
    return folder
