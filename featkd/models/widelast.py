"""Students whose last blocks have the teacher's width [EM26]."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from timm.layers import get_device_dtype
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from featkd.functional import widelast_projection
from featkd.models.base import (
    OwnHead,
    StudentEva,
    StudentVisionTransformer,
    build_timm,
    check_base,
)
from featkd.models.fusion import is_fusible
from featkd.ops.support import is_being_exported

SCHEDULES = ("widelast", "fixed_step", "heads_linear", "fixed_linear")


class BlockSize(NamedTuple):
    """Width of a block's residual stream and its number of attention heads."""

    width: int
    heads: int


def schedule(
    arch: str, width: int, heads: int, depth: int, teacher_dim: int
) -> tuple[BlockSize, ...]:
    """Size of every block of a student with last blocks as wide as the teacher [EM26].

    `widelast` (published name `heads_step`) and `fixed_step` widen only the last block.
    `heads_linear` and `fixed_linear` widen the last n = max(1, depth // 4) blocks, the j-th of
    them (j = 1..n) by the share j/n of the way from `width` to `teacher_dim`:

    - `heads_linear` keeps the channels per head, c = width / heads, and adds heads: the j-th has
      h_j = heads + floor(j/n * (teacher_dim/c - heads)) of them and is c h_j wide. `widelast`
      is the same with n = 1.
    - `fixed_linear` keeps the number of heads and widens them: the j-th block has
      c + j/n * (teacher_dim/heads - c) channels per head, rounded down to a multiple of 8 (but
      never below c; the last block is exactly as wide as the teacher). `fixed_step` is the same
      with n = 1.

    For DeiT-Tiny (192 wide, 3 heads, 12 blocks) and a teacher of 384 these are the published
    widths, 9x192, 256, 320, 384 and 9x192, 240, 312, 384.

    Args:
        arch: one of `SCHEDULES`.
        width: width of the first blocks.
        heads: their number of heads.
        depth: number of blocks.
        teacher_dim: width of the last block.

    Returns:
        `depth` sizes.

    Raises:
        ValueError: `arch` is unknown; `width` is not a multiple of `heads`; `teacher_dim` is not
            above `width`, or not a multiple of the number that the schedule keeps fixed.

    Examples:
        >>> [size.width for size in schedule("fixed_linear", 192, 3, 12, 384)[8:]]
        [192, 240, 312, 384]
    """
    if arch not in SCHEDULES:
        raise ValueError(f"arch: expected one of {', '.join(SCHEDULES)}; got {arch!r}")
    if width % heads:
        raise ValueError(f"embed_dim: expected a multiple of num_heads ({heads}), got {width}")
    if teacher_dim <= width:
        raise ValueError(
            f"teacher_dim: arch {arch!r} needs more than the student's {width}, got {teacher_dim}"
        )
    per_head = width // heads
    keeps_heads = arch.startswith("fixed")
    unit = heads if keeps_heads else per_head
    if teacher_dim % unit:
        kept = f"its {heads} heads" if keeps_heads else f"its {per_head} channels per head"
        raise ValueError(
            f"teacher_dim: arch {arch!r} keeps {kept}, so teacher_dim must be a multiple of "
            f"{unit}; got {teacher_dim}"
        )
    ramp = max(1, depth // 4) if arch.endswith("linear") else 1
    sizes = [BlockSize(width, heads)] * (depth - ramp)
    for step in range(1, ramp):
        if keeps_heads:
            linear = per_head + (teacher_dim // heads - per_head) * step // ramp
            sizes.append(BlockSize(max(per_head, linear // 8 * 8) * heads, heads))
        else:
            more = (teacher_dim // per_head - heads) * step // ramp
            sizes.append(BlockSize((heads + more) * per_head, heads + more))
    last_heads = heads if keeps_heads else teacher_dim // per_head
    return (*sizes, BlockSize(teacher_dim, last_heads))


class ProjectedInput:
    """Method of a pre-norm block that starts a wider residual stream [EM26, WideLast].

    r = proj_norm(proj_in(x));   y = r + attn(norm1(r));   out = y + mlp(norm2(y))
    """

    proj_in: nn.Module
    proj_norm: nn.Module
    norm1: Any

    def add_projection(self, in_dim: int) -> None:
        """Adds the projection and its norm, which is like the block's first one."""
        norm, weight = self.norm1, self.norm1.weight
        like = {"device": weight.device, "dtype": weight.dtype}
        self.proj_in = nn.Linear(in_dim, len(weight), bias=False, **like)
        self.proj_norm = type(norm)(len(weight), eps=norm.eps, **like)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Projects x (B, N, in_dim) to the residual stream r and norm1(r), both (B, N, dim).

        One fused op (`featkd.functional.widelast_projection`) if the three modules are a plain
        Linear and two plain LayerNorms of the same epsilon. Otherwise, for hooks and for exports,
        the modules are called (see `featkd.models.fusion`).
        """
        linear, first, second = cast(tuple[Any, ...], (self.proj_in, self.proj_norm, self.norm1))
        fuses = isinstance(x, Tensor) and is_fusible(linear, first, second)
        if is_being_exported() or not fuses:
            residual = first(linear(x))
            return residual, second(residual)
        return widelast_projection(
            x,
            linear.weight,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            eps=first.eps,
        )


class WideBlock(ProjectedInput, Block):  # type: ignore[misc]
    """timm's Block with a projected input.

    Args:
        in_dim: width of the previous block.
        options: arguments of timm's Block; `dim` is the width of this one.
    """

    def __init__(self, in_dim: int, **options: Any) -> None:
        super().__init__(**options)
        self.add_projection(in_dim)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, in_dim) -> (B, N, dim)."""
        residual, normed = self.project(x)
        attended = self.attn(normed, attn_mask=attn_mask, is_causal=is_causal)
        x = residual + self.drop_path1(self.ls1(attended))
        mixed: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return mixed


class WideEvaBlock(ProjectedInput, EvaBlock):  # type: ignore[misc]
    """timm's EvaBlock with a projected input; created by `adopt`."""

    @classmethod
    def adopt(cls, block: Any, in_dim: int) -> WideEvaBlock:
        """Adds the projection to an EvaBlock, in place."""
        block.__class__ = cls
        block.add_projection(in_dim)
        return cast(WideEvaBlock, block)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(B, N, in_dim) -> (B, N, dim)."""
        x, normed = self.project(x)
        attended = self.attn(normed, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(_scaled(attended, self.gamma_1))
        mixed: Tensor = x + self.drop_path2(_scaled(self.mlp(self.norm2(x)), self.gamma_2))
        return mixed


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


def _block_factory(sizes: Sequence[BlockSize]) -> Callable[..., nn.Module]:
    """timm's `block_fn`: each call creates the next block of a schedule."""
    remaining, before = iter(sizes), 0

    def create(*, dim: int, num_heads: int, **options: Any) -> nn.Module:
        nonlocal before
        in_dim = before or dim
        before, heads = next(remaining)  # instead of the model's `dim` and `num_heads`
        if in_dim == before:
            return cast(nn.Module, Block(dim=before, num_heads=heads, **options))
        return WideBlock(in_dim=in_dim, dim=before, num_heads=heads, **options)

    return create


class WideStudent(OwnHead):
    """Methods of `WideLast` and `WideLastEva`: a timm ViT with wide last blocks."""

    sizes: tuple[BlockSize, ...]

    @property
    def own_modules(self) -> tuple[str, ...]:
        """Modules that don't come from the base."""
        wide = (f"blocks.{i}" for i, size in enumerate(self.sizes) if size.width != self.embed_dim)
        return (*wide, "norm", "fc_norm", "attn_pool", "head")

    def _widen_end(self, pooling: nn.Module | None) -> None:
        """Sets the widths of final norm, attention pooling, head and timm's feature records.

        Args:
            pooling: attention pooling of the last width, on the meta device, if the base has one.
        """
        width = self.sizes[-1].width
        for name in ("norm", "fc_norm"):
            norm = getattr(self, name)
            if not isinstance(norm, nn.Identity):
                setattr(self, name, type(norm)(width, eps=norm.eps, **get_device_dtype(self)))
        if pooling is not None:
            self._materialise(pooling, "attn_pool")
            self.attn_pool = pooling
        for info, size in zip(self.feature_info, self.sizes, strict=True):
            info["num_chs"] = size.width
        self._set_num_features(width)


class WideLast(WideStudent, StudentVisionTransformer):
    """A ViT whose last blocks have the teacher's width, by one of the `SCHEDULES` [EM26].

    A block whose width differs from the previous one is a `WideBlock`. The final norm, attention
    pooling if the base has it, and the head have the last width. The last block's output is
    matched to the teacher; pooling (DeiT: the class token) and attention are the base's.
    Created by `WideLast.build` or `featkd.models.create_student(arch="widelast")`.
    """

    @staticmethod
    def build(base: str, arch: str, teacher_dim: int, **timm_kwargs: Any) -> WideStudent:
        """Builds `base` by timm with the block sizes of a schedule.

        Args:
            base: timm name of a VisionTransformer or an Eva.
            arch: one of `SCHEDULES`.
            teacher_dim: width of the last block.
            timm_kwargs: other arguments of the timm model.

        Returns:
            A WideLast or a WideLastEva.

        Raises:
            ValueError: the base is of another class, its blocks are not timm's standard ones, the
                widths don't match (see `schedule`), or its rotary position embeddings don't fit
                the wide blocks.
        """
        on_meta = {**timm_kwargs, "device": "meta"}  # only shapes: no memory, no random numbers
        probe: Any = build_timm(base, **on_meta)
        check_base(probe, arch)
        first, standard = probe.blocks[0], EvaBlock if isinstance(probe, Eva) else Block
        if type(first) is not standard:
            raise ValueError(
                f"base: arch {arch!r} needs timm's standard {standard.__name__}, "
                f"but {base!r} is made of {type(first).__name__}; expected another base, or arch "
                "'lift' or 'plain'"
            )
        heads = first.attn.num_heads
        sizes = schedule(arch, probe.embed_dim, heads, len(probe.blocks), teacher_dim)

        @functools.cache
        def widened(size: BlockSize) -> Any:
            return build_timm(base, **on_meta | {"embed_dim": size.width, "num_heads": size.heads})

        if isinstance(probe, Eva):
            _check_rope(probe, base, arch)
            model: Any = build_timm(base, **timm_kwargs)
            model.__class__ = WideLastEva
            model._widen_blocks(sizes, widened)
        else:
            model = build_timm(base, **timm_kwargs, block_fn=_block_factory(sizes))
            model._model_args.pop("block_fn", None)  # timm writes these into exported config files
            model.__class__ = WideLast
        model.sizes = sizes
        model._widen_end(probe.attn_pool and widened(sizes[-1]).attn_pool)
        return cast(WideStudent, model)


class WideLastEva(WideStudent, StudentEva):
    """`WideLast` on timm's Eva: DINOv3, EVA-02, Perception Encoder.

    All blocks share the base's rotary position embeddings, so `build` refuses schedules that
    change the channels per head.
    """

    def _widen_blocks(
        self, sizes: Sequence[BlockSize], widened: Callable[[BlockSize], Any]
    ) -> None:
        """Replaces the blocks that the schedule widens.

        Args:
            sizes: size of every block.
            widened: returns a timm model of that size, on the meta device.
        """
        before = self.embed_dim
        for layer, size in enumerate(sizes):
            if size.width != self.embed_dim:
                # timm's Eva takes no block_fn: a whole model has the block's other arguments.
                block = widened(size).blocks[layer]
                if size.width != before:
                    block = WideEvaBlock.adopt(block, before)
                self._materialise(block, f"blocks.{layer}")
                self.blocks[layer] = block
            before = size.width


def _check_rope(probe: Any, base: str, arch: str) -> None:
    """Checks that rotary position embeddings fit blocks with more heads, or with wider ones."""
    if probe.rope is None:
        return
    if probe.rope_mixed:
        raise ValueError(
            f"base: arch {arch!r} changes the attention heads, but {base!r} has learned rotary "
            "frequencies for each of its own; expected another base, or arch 'lift' or 'plain'"
        )
    if arch.startswith("fixed"):
        raise ValueError(
            f"arch: {arch!r} changes the channels per head, but the rotary position embeddings of "
            f"{base!r} have a fixed number; expected 'widelast' or 'heads_linear'"
        )
