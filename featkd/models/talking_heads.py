"""CaiT's talking-heads attention by featkd's fused op, for models that are not trained."""

from __future__ import annotations

import torch
from timm.models.cait import TalkingHeadAttn
from torch import Tensor, nn

from featkd.functional import talking_heads_attention
from featkd.models.fusion import can_bypass
from featkd.ops.backends import wanted_backend


class FusedTalkingHeads(TalkingHeadAttn):  # type: ignore[misc]
    """timm's TalkingHeadAttn through `featkd.functional.talking_heads_attention`.

    Same weights; results differ by rounding only. timm's forward runs instead if the device is not
    a CPU, in training mode, if gradients are needed, with a backend other than "auto", and if one
    of the two head-mixing layers has hooks or was replaced.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        fused = x.device.type == "cpu" and wanted_backend() == "auto" and not self.training
        if not fused or not can_bypass(self.proj_l, self.proj_w):
            return super().forward(x)  # type: ignore[no-any-return]
        if torch.is_grad_enabled() and (x.requires_grad or self.proj_w.weight.requires_grad):
            return super().forward(x)  # type: ignore[no-any-return]
        batch, tokens, channels = x.shape
        heads = self.num_heads
        qkv = self.qkv(x).reshape(batch, tokens, 3, heads, channels // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        pre, post = self.proj_l, self.proj_w
        mixes = (pre.weight, pre.bias, post.weight, post.bias)
        out = talking_heads_attention(q, k, v, *mixes, scale=self.scale)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, channels))  # type: ignore[no-any-return]


def fuse_talking_heads(model: nn.Module) -> None:
    """Changes the class of every TalkingHeadAttn in `model`, in place; the weights stay."""
    for module in model.modules():
        if type(module) is TalkingHeadAttn:
            module.__class__ = FusedTalkingHeads
