"""One rank of `test_parallel.py`: trains as a run does and records when gradients are reduced."""

# The annotations of a communication hook must be classes, not strings.
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from featkd.runtime import distributed
from featkd.train.recipe_file import load_recipe
from featkd.train.teacher import Teacher
from featkd.train.trainer import Trainer

UPDATES = 3  # DDP arranges its buckets after the first
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}


def main() -> None:
    """Trains the recipe argv[1] on this rank; `train` saves its result."""
    compile_module = torch.nn.Module.compile

    def compile_fast(module: torch.nn.Module, **_: object) -> None:
        """Stands in for Inductor, which takes minutes; forms the same graphs."""
        if not isinstance(module, Teacher):
            compile_module(module, backend="aot_eager")

    torch.nn.Module.compile = compile_fast
    with distributed.joined("cpu") as context:
        train(context)


def train(context: distributed.ProcessContext) -> None:
    """Trains `UPDATES` updates of the recipe argv[1]; saves what happened in argv[2].RANK.

    The profile of the last update tells which buckets DDP began to reduce before the last matrix
    product of the backward pass.
    """
    trainer = Trainer(load_recipe(Path(sys.argv[1])), context)
    trainer.components.student.train()
    forward = trainer.components.student_forward
    assert isinstance(forward, DistributedDataParallel)
    sizes: list[int] = []

    def reduce(group: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sizes.append(bucket.buffer().nbytes)
        with record_function("reduce"):
            return allreduce_hook(group, bucket)

    forward.register_comm_hook(None, reduce)
    batches = trainer.batches(0)
    losses = []
    for _ in range(UPDATES - 1):
        losses.append(trainer.step([next(batches)]).total.item())
    sizes.clear()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        losses.append(trainer.step([next(batches)]).total.item())
    events = profiler.events()
    starts = sorted(event.time_range.start for event in events if event.name == "reduce")
    last_product = max(event.time_range.start for event in events if event.name in PRODUCTS)
    early = [size for size, start in zip(sizes, starts, strict=True) if start < last_product]
    weights = trainer.components.student.state_dict()
    torch.save(
        {"losses": losses, "sizes": sizes, "early": sum(early), "weights": weights},
        f"{sys.argv[2]}.{context.rank}",
    )
    trainer.components.close()
