"""Mixed precision: autocast, and frozen models with weights in half precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from timm.models.cait import TalkingHeadAttn
from torch import nn

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(amp: str, device: torch.device) -> AbstractContextManager[object]:
    """Autocast context for a recipe's `amp`."""
    dtype = AMP_DTYPES.get(amp)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def cast_matmul_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights of linear layers and convolutions of a frozen model, in place.

    Autocast would cast these weights in every forward pass. Under autocast the outputs are bitwise
    the same, without these casts and with half the memory for the weights.

    Norms, position embeddings and scales keep their dtype. So do the head mixes of talking-heads
    attention, which `featkd.functional.talking_heads_attention` takes in float32.
    """
    mixes = {
        mix
        for module in model.modules()
        if isinstance(module, TalkingHeadAttn)
        for mix in (module.proj_l, module.proj_w)
    }
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module not in mixes:
            module.to(dtype)
