"""The student on several ranks: replicated by DDP, or sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from featkd.models.features import FeatureModel, layers_of
from featkd.runtime.distributed import ProcessContext

_BUCKETS = 6
_MIB = 1 << 20


def replicate(student_forward: nn.Module, context: ProcessContext) -> DistributedDataParallel:
    """Wraps a module in DDP, which reduces gradients while the backward pass runs.

    A compiled module would compute all gradients in one autograd node, so that none is ready before
    the end. torch splits a module that was compiled before it is wrapped at DDP's buckets.

    Args:
        student_forward: each backward pass must reach all its parameters.
        context: this process.
    """
    size = sum(p.nbytes for p in student_forward.parameters() if p.requires_grad)
    # torch's bucket of 25 MiB holds all gradients of a DeiT-Tiny, whose reduction would start after
    # the backward pass. Below 1 MiB torch does not split a compiled module. No static_graph: it
    # only saves the search for unused parameters, which is off, and fails under no_sync.
    return DistributedDataParallel(
        student_forward,
        device_ids=[context.device] if context.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        bucket_cap_mb=max(1, size / _BUCKETS / _MIB),  # a float is allowed
    )


def shard(
    models: Iterable[FeatureModel], projectors: Iterable[nn.Module], context: ProcessContext
) -> None:
    """Shards the weights of models and projectors over all ranks, in place, layer by layer.

    Their parameters become DTensors, which an optimizer must be created from. Methods that run the
    model gather the weights as its forward does.
    """
    mesh = init_device_mesh(context.device.type, (context.world_size,))
    for model in models:
        assert isinstance(model, nn.Module)
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        for method in ("forward_with_features", "forward_maps", "forward_with_loss"):
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
    for projector in projectors:
        fully_shard(projector, mesh=mesh)


@contextmanager
def gathered(models: Iterable[nn.Module]) -> Iterator[None]:
    """Holds all weights of sharded models on each rank, so that a forward pass needs no other rank.

    Ranks may evaluate different numbers of batches.
    """
    sharded = [m for model in models for m in model.modules() if isinstance(m, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in sharded:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


def without_reduction(student_forward: nn.Module) -> AbstractContextManager[object]:
    """Context of a micro-batch whose gradients are only added up on this rank."""
    if isinstance(student_forward, DistributedDataParallel):
        return student_forward.no_sync()
    sharded = [module for module in student_forward.modules() if isinstance(module, FSDPModule)]
    return _unreduced(sharded) if sharded else nullcontext()


@contextmanager
def _unreduced(modules: Iterable[FSDPModule]) -> Iterator[None]:
    for module in modules:
        module.set_requires_gradient_sync(False, recurse=False)
    yield
    for module in modules:
        module.set_requires_gradient_sync(True, recurse=False)


def full(x: Tensor) -> Tensor:
    """Returns the whole of a tensor that may be sharded; a collective if it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """Returns this rank's shard of `x` if `like` is sharded, otherwise `x`.

    Args:
        x: the whole tensor, equal on all ranks.
        like: a parameter of the same shape.
    """
    if not isinstance(like, DTensor):
        return x
    # No rank is the source: each has the whole, and nothing is sent.
    return distribute_tensor(
        x.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def shard_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shards a state dict as the weights of `model` are; unknown names are kept."""
    own: Mapping[str, Any] = model.state_dict()
    return {name: shard_like(x, own[name]) if name in own else x for name, x in state.items()}


def shard_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Shards the state dict of an optimizer as its parameters are, in place."""
    groups = zip(optimizer.param_groups, saved["param_groups"], strict=True)
    for own, group in groups:
        for parameter, number in zip(own["params"], group["params"], strict=True):
            state = saved["state"].get(number, {})
            for name, x in state.items():
                if isinstance(x, Tensor) and x.shape == parameter.shape:
                    state[name] = shard_like(x, parameter)
