"""The kernels under FSDP2 and DDP: gradients of two processes match those of one."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import featkd
from featkd.losses import ProjectedFeatureKD
from tests.kernels.conftest import executing


class Student(nn.Module):
    """A block and the loss that owns the projector."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 12))
        self.loss = ProjectedFeatureKD(12, 20, metric="spectral", grid=(3, 4))

    def forward(self, x: Tensor, teacher: Tensor) -> Tensor:
        return self.loss(self.block(x), teacher)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        found[name.removeprefix("module.")] = whole
    return found


def main() -> None:
    """Entry point of each rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    student, x, teacher = Student(), torch.randn(4, 12, 6), torch.randn(4, 12, 20)
    mine = slice(2 * rank, 2 * rank + 2)
    plain, parallel, sharded = student, copy.deepcopy(student), copy.deepcopy(student)
    plain(x, teacher).backward()
    parallel = nn.parallel.DistributedDataParallel(parallel)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for part in (sharded.block, sharded.loss, sharded):
        fully_shard(part, mesh=mesh)
    with executing(check=False) as ran, featkd.use_backend("triton"):
        parallel(x[mine], teacher[mine]).backward()
        sharded(x[mine], teacher[mine]).backward()
    assert ran == ["distance_forward", "sum_partials", "distance_backward", "sum_partials"] * 2
    want = gradients(plain)
    for model in (parallel, sharded):
        found = gradients(model)
        assert set(found) == set(want)
        for name, gradient in want.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()
    print("equal")


@pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")
def test_ddp_and_fsdp_match_single_process_gradients(server):
    with executing(check=False), featkd.use_backend("triton"):  # compiles for both ranks
        Student()(torch.randn(2, 12, 6), torch.randn(2, 12, 20)).backward()
    script = "from tests.ops.test_sharded import main; main()"
    ranks = server.ranks(2, script=script, env={"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]})
    for rank in ranks:
        assert rank.wait(180) == 0, rank.stderr[-3000:]
        assert rank.stdout.splitlines()[-1] == "equal"  # gloo prints as well
