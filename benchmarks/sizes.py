"""The sizes that are timed, by name of the set."""

from __future__ import annotations

from .problem import Maps

SETS = ("small", "published", "large", "grids")

_PUBLISHED_BATCHES = (32, 64, 128, 256)

# small: a moment's run. published: DeiT-Tiny from CaiT-S24 at 224 x 224, patch 16 ([EM26]).
# large: teachers of ViT-L's (1024) and ViT-H's (1280, patch 14) width. grids: patches of 32 and 14
# at 224 x 224, and one image of 518 x 518 at patch 14
MAPS = {
    "small": (Maps(4, (14, 14), 192, 384),),
    "published": tuple(Maps(batch, (14, 14), 192, 384) for batch in _PUBLISHED_BATCHES),
    "large": (
        Maps(32, (14, 14), 384, 1024),
        Maps(32, (14, 14), 768, 1024),
        Maps(32, (16, 16), 1024, 1280),
    ),
    "grids": (
        Maps(8, (7, 7), 192, 384),
        Maps(8, (16, 16), 192, 384),
        Maps(1, (37, 37), 384, 1024),
    ),
}

# (images, classes): ImageNet-1K's classes and, large, those of ImageNet-21K
LOGITS = {
    "small": ((4, 1000),),
    "published": tuple((batch, 1000) for batch in _PUBLISHED_BATCHES),
    "large": ((32, 21841), (256, 21841)),
    "grids": (),
}

# (images, heads, tokens, channels of a head): CaiT-S24 at 224 x 224; large, CaiT-M36 at 224 and
# CaiT-S24 at 384
HEADS = {
    "small": ((1, 8, 196, 48),),
    "published": tuple((batch, 8, 196, 48) for batch in _PUBLISHED_BATCHES),
    "large": ((32, 16, 196, 48), (8, 8, 576, 48)),
    "grids": (),
}
