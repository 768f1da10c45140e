"""torch.compile's cache on disk, which knows a custom op by its name alone."""

from __future__ import annotations

import hashlib
from importlib import resources

import torch.compiler.config as config


def tag_compile_cache() -> None:
    """Keeps graphs compiled with other versions of featkd's ops out of this process.

    torch keys a compiled graph by the names of the ops in it, and keeps what it traced of their
    backward passes: code compiled before an op changed came back after it, and called the op with
    arguments that it no longer had, or gave the old gradient (torch 2.14). So the key's tag, which
    the user may have set too, gets a digest of the ops' sources. A second call changes nothing.

    torch's settings belong to a thread: this holds for the thread that imports the ops first.
    TORCH_COMPILE_CACHE_KEY_TAG holds for all.
    """
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted((resources.files("featkd") / "ops").iterdir(), key=lambda file: file.name):
        if source.is_file():
            digest.update(source.read_bytes())
    tag = f"featkd.ops-{digest.hexdigest()}"
    if tag not in config.cache_key_tag:
        config.cache_key_tag += tag
