"""Tag for torch.compile's cache on disk, which identifies a custom op by its name alone."""

from __future__ import annotations

import hashlib
from importlib import resources

import torch.compiler.config as config


def tag_compile_cache() -> None:
    """Keeps this process from loading graphs compiled with other versions of featkd's ops.

    The key of a compiled graph holds the names of its ops, and the graph holds their traced
    backward passes. After a change of an op, torch 2.14 would load the old graph, which calls the
    op with its old arguments or computes the old gradient. This function appends a digest of the
    ops' sources to the tag in the key, which the user may also have set. A second call changes
    nothing.

    torch's settings are per thread: the tag is set in the thread that imports the ops first.
    TORCH_COMPILE_CACHE_KEY_TAG applies to all threads.
    """
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted((resources.files("featkd") / "ops").iterdir(), key=lambda file: file.name):
        if source.is_file():
            digest.update(source.read_bytes())
    tag = f"featkd.ops-{digest.hexdigest()}"
    if tag not in config.cache_key_tag:
        config.cache_key_tag += tag
