"""The op behind `functional.talking_heads_attention`: schema and choice of backend.

Forward only: it is the teacher's. With gradients the reference runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featkd import backends, reference
from featkd.ops import support

NAME = "talking_heads_attention"
MOST_CHANNELS = 768  # of all heads: of more the kernel's tiles spill, or fit no shared memory


def talking_heads_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor,
    post_weight: Tensor,
    post_bias: Tensor,
    *,
    scale: float,
) -> Tensor:
    """The output by the chosen backend; arguments as in `featkd.reference`, taken as valid."""
    parameters = (pre_weight, pre_bias, post_weight, post_bias)
    tensors = (query, key, value, *parameters)

    def unsupported(backend: str) -> str:
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return "an input that requires grad, and the fused forms have no backward pass"
        batch, heads, tokens, dim = query.shape
        if backend == "triton" and heads * dim > MOST_CHANNELS:
            return f"{heads} heads of {dim} channels, together more than {MOST_CHANNELS}"
        return support.unsupported(backend, query, batch * tokens, tensors[1:])

    backend = "reference"
    if not support.is_being_exported():
        backend = backends.choose(NAME, query.device, unsupported)
    if backend == "reference":
        backends.record(NAME, backend)
        return reference.talking_heads_attention(query, key, value, *parameters, scale=scale)
    compute = support.operand_dtype(backend, query)
    mixes = (pre_weight, post_weight, post_bias)  # the softmax is the same for any pre_bias
    out: Tensor = _forward(query, key, value, *mixes, scale, compute, backend)
    return out


@torch.library.custom_op("featkd::talking_heads_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pre_weight: Tensor,
    post_weight: Tensor,
    post_bias: Tensor,
    scale: float,
    compute: torch.dtype,
    backend: str,
) -> Tensor:
    backends.record(NAME, backend)
    tensors = (query, key, value, pre_weight, post_weight, post_bias)
    if backend == "cpu":
        from featkd.cpu import talking_heads_attention as cpu

        return cpu.forward(*tensors, scale=scale)
    from featkd.kernels import talking_heads_attention as kernels

    result: Tensor = kernels.forward(*tensors, scale=scale, compute=compute)
    return result


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pre_weight: Tensor,
    post_weight: Tensor,
    post_bias: Tensor,
    scale: float,
    compute: torch.dtype,
    backend: str,
) -> Tensor:
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, tokens, heads, dim).transpose(1, 2)
