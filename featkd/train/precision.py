"""Mixed precision; where a device multiplies in bf16, and a model whose weights are held in it."""

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


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products of bf16 matrices are at least as fast on `device` as those of float32.

    A CPU without vector instructions for them (AVX2) takes torch's plain loops: 1,568 rows of 384
    to 1,536 took 8 times as long there as in float32, and a CaiT-S24's forward pass 5.6 times.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
