"""The sizes that are timed, as named sets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Maps:
    """Sizes of a pair of feature maps: images, patch grid, student and teacher channels."""

    batch: int
    grid: tuple[int, int]
    student: int
    teacher: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the projection from student to teacher channels."""
        return self.batch * self.tokens * self.student * self.teacher

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.student}to{self.teacher}"


@dataclass(frozen=True)
class Sizes:
    """Sizes for every op; an op without sizes has no problems in the set."""

    maps: tuple[Maps, ...] = ()
    logits: tuple[tuple[int, int], ...] = ()
    """(images, classes) for `soft_kd`."""
    heads: tuple[tuple[int, int, int, int], ...] = ()
    """(images, heads, tokens, channels per head) for `talking_heads_attention`."""


_BATCHES = (32, 64, 128, 256)

SETS = {
    # a run of a few seconds
    "small": Sizes((Maps(4, (14, 14), 192, 384),), ((4, 1000),), ((1, 8, 196, 48),)),
    # DeiT-Tiny from CaiT-S24 at 224 x 224, patch 16 ([EM26]), on ImageNet-1K
    "published": Sizes(
        tuple(Maps(batch, (14, 14), 192, 384) for batch in _BATCHES),
        tuple((batch, 1000) for batch in _BATCHES),
        tuple((batch, 8, 196, 48) for batch in _BATCHES),
    ),
    # teachers of ViT-L's (1024) and ViT-H's (1280, patch 14) width; the classes of ImageNet-21K;
    # CaiT-M36 at 224 and CaiT-S24 at 384
    "large": Sizes(
        (
            Maps(32, (14, 14), 384, 1024),
            Maps(32, (14, 14), 768, 1024),
            Maps(32, (16, 16), 1024, 1280),
        ),
        ((32, 21841), (256, 21841)),
        ((32, 16, 196, 48), (8, 8, 576, 48)),
    ),
    # patches of 32 and 14 at 224 x 224, and one image of 518 x 518 at patch 14
    "grids": Sizes(
        (
            Maps(8, (7, 7), 192, 384),
            Maps(8, (16, 16), 192, 384),
            Maps(1, (37, 37), 384, 1024),
        )
    ),
}
