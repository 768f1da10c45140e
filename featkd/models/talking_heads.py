"""CaiT's talking-heads attention without its permuted copies, for models that are not trained."""

from __future__ import annotations

import torch
from timm.models.cait import TalkingHeadAttn
from torch import Tensor, nn

from featkd.backends import wanted_backend
from featkd.models.fusible import can_bypass


class LeanTalkingHeads(TalkingHeadAttn):  # type: ignore[misc]
    """timm's TalkingHeadAttn with the heads mixed where they lie.

    softmax(W_l S + b_l) and (W_w P + b_w) V of scores S and shares P, (B, heads, N, N) [Shazeer et
    al., 2003.02436]. timm applies W to the last axis of a permuted copy of S, and of P. Here W
    multiplies (heads, N N) as it lies. b_l adds one number to all of a head's scores, of which the
    softmax is independent; b_w adds b_w sum_n V_n to a head's output. The same numbers but for
    rounding. A whole CaiT-S24's forward pass in float32 on two AVX2 cores: 7.1 images/s, not 5.5.

    In training mode, on the backend "reference", and where somebody watches or has replaced one of
    the two mixes, it is timm's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        plain = self.training or wanted_backend() == "reference"
        if plain or not can_bypass(self.proj_l, self.proj_w):
            return super().forward(x)  # type: ignore[no-any-return]
        batch, tokens, channels = x.shape
        heads = self.num_heads
        split = self.qkv(x).reshape(batch, tokens, 3, heads, channels // heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        scores = (q * self.scale @ k.transpose(-2, -1)).flatten(2)
        mixed = torch.matmul(self.proj_l.weight, scores).view(batch, heads, tokens, tokens)
        shares = mixed.softmax(-1).flatten(2)
        mixed = torch.matmul(self.proj_w.weight, shares).view(batch, heads, tokens, tokens)
        out = mixed @ v + self.proj_w.bias[:, None, None] * v.sum(2, keepdim=True)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, channels))  # type: ignore[no-any-return]


def mix_heads_in_place(model: nn.Module) -> None:
    """Let every TalkingHeadAttn of timm in `model` compute so; its weights stay where they are."""
    for module in model.modules():
        if type(module) is TalkingHeadAttn:
            module.__class__ = LeanTalkingHeads
