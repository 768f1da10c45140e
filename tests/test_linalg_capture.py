"""linalg calls only operators that a CUDA graph can capture.

No GPU is needed: the tests dispatch on fake CUDA tensors and check each operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import featkd
from featkd import linalg
from featkd.ops import backends, extension

# operators that wait for the GPU
WAITS = ("_local_scalar_dense", "_linalg_check_errors", "nonzero", "masked_select", "unique")
# operators that may wait on CUDA, or that process one matrix at a time
ONE_BY_ONE = ("_linalg_eigh", "linalg_qr", "_linalg_svd")


class Capturing(TorchDispatchMode):
    """Raises for operators that wait for the GPU, copy from the host or loop over matrices."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS or name in ONE_BY_ONE:
            raise AssertionError(f"{name} in a capture")
        result = func(*args, **(kwargs or {}))
        given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        if isinstance(result, Tensor) and result.is_cuda:
            assert all(x.is_cuda for x in given), f"{name} copies from the host in a capture"
        return result


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tensor]]:
    """Function that creates fake CUDA tensors, as if during a capture with csrc built for CUDA."""
    monkeypatch.setattr(extension, "has_kernel", lambda op, device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(backends, "_last", backends._Last())
    with FakeTensorMode():
        yield lambda *shape, **options: torch.empty(shape, device="cuda", **options)


CALLS: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "spectrum": ("spectrum", linalg.spectrum),
    "svdvals": ("spectrum", linalg.svdvals),
    "energy_ranks": ("spectrum", linalg.energy_ranks),
    "energy_curve": ("spectrum", linalg.energy_curve),
    "leading": ("svd", lambda x: linalg.svd(x, 7)),
    "all by Gram matrix": ("svd", lambda x: linalg.svd(x, min(x.shape[-2:]))),
    "jacobi": ("svd", lambda x: linalg.svd(x, method="jacobi")),
    "principal_angles": ("", lambda x: linalg.principal_angles(x[..., :5], x[..., 2:9])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6, 196, 384), (2, 3, 20, 12)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_operators_are_capturable(cuda, name: str, shape: tuple[int, ...], dtype: torch.dtype):
    op, call = CALLS[name]
    x = cuda(*shape, dtype=dtype)
    with Capturing():
        found = call(x)
    parts = [found] if isinstance(found, Tensor) else list(found)  # type: ignore[call-overload]
    assert all(part.is_cuda for part in parts)
    assert not op or featkd.last_backend(op) == "cuda"


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: torch.tensor([0.8, 0.9], device="cuda"),
        lambda x: x.new_tensor([0.8, 0.9]),
        lambda x: x + torch.ones(3).to(x.device),
        lambda x: torch.where(x > 0, x, torch.tensor(1.0)),
        lambda x: x[0, 0].item(),
        lambda x: bool(x.isnan().any()),
        lambda x: torch.linalg.qr(x).Q,
        lambda x: torch.linalg.cholesky(x),
        lambda x: torch.linalg.svdvals(x),
    ],
)
def test_uncapturable_operators_are_detected(cuda, bad: Callable[[Tensor], object]):
    x = cuda(3, 3)
    with pytest.raises(AssertionError, match="in a capture"), Capturing():
        bad(x)
