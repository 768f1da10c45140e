"""Mixed precision: a run's autocast, and a frozen model whose weights are held in bf16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from timm.models.cait import TalkingHeadAttn
from torch import nn

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(amp: str, device: torch.device) -> AbstractContextManager[object]:
    """The context of a recipe's `amp`."""
    dtype = AMP_DTYPES.get(amp)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def hold_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the weights that autocast would cast to `dtype` at every use in `dtype`, in place.

    The weights of linear layers and convolutions: under autocast the model computes the same
    numbers, bit by bit, without casting them for every batch and in half the memory for them.
    Norms, position embeddings and scales stay as they are, and so do the mixes of talking heads,
    which `featkd.functional.talking_heads_attention` takes in full. For frozen models.
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
