"""The op behind `linalg.svd(method="jacobi")`: schema, fake, and the steps around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd import backends, extension
from featkd.ops.spectrum import MOST_ROWS

NAME = "svd"
_MOST_SWEEPS = 60  # of csrc/jacobi.h
_VECTOR = {"cpu": 8, "cuda": 32}  # numbers of the widest


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin U, S, Vh of matrices (..., N, D), in float64, by the chosen backend.

    Raises:
        RuntimeError: a matrix holds NaN or Inf, or does not converge.
    """
    kind = x.device.type  # csrc has a half for each
    backend = backends.choose(
        NAME, x.device, lambda: _unsupported(x), own=kind, devices=("cpu", "cuda")
    )
    backends.record(NAME, backend)
    if not bool(x.isfinite().all()):
        raise RuntimeError("svd: x holds NaN or Inf, of which Jacobi finds no singular vectors")
    wide = x.double()
    if backend == "reference":
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        return u, s, vh
    batch = x.shape[:-2]
    if x.shape[-2] < x.shape[-1]:
        v, s, uh = _tall(wide.mT.reshape(-1, x.shape[-1], x.shape[-2]))
        u, vh = uh.mT, v.mT
    else:
        u, s, vh = _tall(wide.reshape(-1, *x.shape[-2:]))
    u, s, vh = (part.reshape((*batch, *part.shape[1:])) for part in (u, s, vh))
    return u, s, vh


def _unsupported(x: Tensor) -> str:
    device = x.device.type
    if device not in ("cpu", "cuda"):
        return f"Jacobi has no kernel for tensors on {device}"
    if not 1 <= min(x.shape[-2:]) <= MOST_ROWS:
        return f"the smaller side of {x.shape[-2]} x {x.shape[-1]} is not 1 to {MOST_ROWS}"
    why: str = extension.missing()
    if why:
        return why
    return "" if extension.has_kernel("featkd::jacobi", device) else f"csrc has no {device} half"


def _tall(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of (B, N, D), N >= D: QR, then Jacobi on the rows of R."""
    n = x.shape[-1]
    largest = x.abs().amax((-2, -1), keepdim=True) if len(x) else x.new_zeros(0, 1, 1)
    scale = torch.where(largest > 0, largest, 1)
    q, r = torch.linalg.qr(x / scale)
    rows, turns, sweeps = torch.ops.featkd.jacobi(F.pad(r, (0, -n % _VECTOR[x.device.type])))
    if bool((sweeps > _MOST_SWEEPS).any()):
        raise RuntimeError(f"svd: a matrix does not converge in {_MOST_SWEEPS} sweeps")
    # the rows are s_i v_i^T: their QR divides by s_i, and completes where s_i is zero
    v, lengths = torch.linalg.qr(rows[..., :n].mT)
    signs = torch.where(lengths.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(x.dtype)
    values = torch.linalg.vector_norm(rows, dim=-1) * scale[..., 0]
    return q @ turns[..., :n].mT, values, (v * signs.unsqueeze(-2)).mT


torch.library.define(
    "featkd::jacobi", "(Tensor rows) -> (Tensor orthogonal, Tensor turns, Tensor sweeps)"
)


@torch.library.register_fake("featkd::jacobi")  # type: ignore[untyped-decorator]
def _(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        rows.new_empty(rows.shape),
        rows.new_empty(rows.shape),
        rows.new_empty(rows.shape[0], dtype=torch.int32),
    )
