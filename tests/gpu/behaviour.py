"""Behaviour of the ops: views, streams, devices, CUDA graphs, compilation, size."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor

import featkd
from benchmarks.gpu.recorder import NotHere
from featkd.ops import backends

from .accuracy import (
    BF16,
    PRECISIONS,
    Precision,
    backend_on,
    inputs_of,
    leaves_of,
    relative,
    results,
    run_ours,
    upstream_of,
)
from .forms import Form, Sizes, Tensors

FP32 = PRECISIONS["fp32"]
# precisions of the checks of torch.compile and CUDA graphs, besides float32
OTHERS = {
    "fp64": Precision(torch.float64, torch.float64),
    "autocast_bf16": PRECISIONS["autocast-bf16"],
    "autocast_fp16": PRECISIONS["autocast-fp16"],
}
_CLOSE = 2e-5  # between two float32 computations with sums in another order
_CLOSE_HALF = 0.02  # on a GPU, between two half-precision products by different algorithms
_CLOSE_FP64 = 1e-12


def sizes_for(form: Form, device: torch.device) -> Sizes:
    """Returns a usual size for a GPU, a tiny one for a CPU."""
    logits = form.op == "soft_kd"
    if device.type == "cpu":
        return Sizes(3, (1, 1), 12, 12) if logits else Sizes(2, (3, 4), 12, 20)
    return Sizes(8, (1, 1), 1000, 1000) if logits else Sizes(4, (14, 14), 192, 384)


def close(precision: Precision, device: torch.device, fp32: float = _CLOSE) -> float:
    """Allowed relative difference between two computations of the same in a precision."""
    if precision.student == torch.float64:
        return _CLOSE_FP64
    return _CLOSE_HALF if precision.is_half and device.type == "cuda" else fp32


def assert_close(got: Tensors, want: Tensors, tolerance: float = _CLOSE) -> None:
    """Compares all outputs and gradients by their dtypes and relative L2 errors."""
    assert set(got) == set(want)
    for name, x in want.items():
        assert got[name].dtype == x.dtype, f"{name}: {got[name].dtype}, not {x.dtype}"
        error = relative(got[name], x)
        assert error <= tolerance, f"{name}: differs by {error:.1e}, allowed {tolerance:.1e}"


def _views(x: Tensor) -> dict[str, Tensor]:
    """Returns tensors with the values of x and other memory layouts."""
    wider = x.new_zeros([size + 3 for size in x.shape])
    inner = wider[tuple(slice(1, 1 + size) for size in x.shape)]
    inner.copy_(x)
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    shifted = x.new_zeros(x.numel() + 1)[1:].view(x.shape)  # no row is aligned to 16 bytes
    shifted.copy_(x)
    return {"strided": inner, "transposed": turned, "misaligned": shifted}


def views(form: Form, device: torch.device) -> None:
    """Strided, transposed and misaligned inputs give the results of contiguous ones."""
    sizes = sizes_for(form, device)
    tensors = inputs_of(form, sizes, FP32, device)
    want = run_ours(form, tensors, sizes)
    for kind in ("strided", "transposed", "misaligned"):
        other = {name: _views(x.detach())[kind] for name, x in tensors.items()}
        for name, x in other.items():
            assert torch.equal(x, tensors[name])
        assert_close(run_ours(form, leaves_of(form, other), sizes), want)


def expanded(form: Form, device: torch.device) -> None:
    """Inputs and upstream gradients with strides of 0 give the results of their copies."""
    sizes = sizes_for(form, device)
    tensors = inputs_of(form, sizes, FP32, device)
    rows = ("student", "teacher", "features", "x", "target")
    one = {k: x.detach()[:1] if k in rows else x.detach() for k, x in tensors.items()}

    def spread(x: Tensor) -> Tensor:
        return x.expand(sizes.batch, *x.shape[1:])

    views = {k: spread(x) if k in rows else x for k, x in one.items()}
    copies = {k: x.clone() for k, x in views.items()}
    want = run_ours(form, leaves_of(form, copies), sizes)
    assert_close(run_ours(form, leaves_of(form, views), sizes), want)
    leaves = _leaves(form, tensors)
    with _backend(device):
        outputs = form.ours(tensors, sizes)
        summed = torch.autograd.grad([y.sum() for y in outputs], leaves)
        outputs = form.ours(tensors, sizes)
        ones = [torch.ones_like(y) for y in outputs]
        plain = torch.autograd.grad(outputs, leaves, ones)
    assert_close(*({str(n): x for n, x in enumerate(found)} for found in (summed, plain)), 1e-4)


def not_a_number(form: Form, device: torch.device) -> None:
    """NaN in one element reaches the outputs, and so does a wrong class index on a GPU."""
    sizes = sizes_for(form, device)
    for name in ("student", "teacher", "features", "x"):
        tensors = {k: x.detach() for k, x in inputs_of(form, sizes, FP32, device).items()}
        if name not in tensors:
            continue
        tensors[name][-1, -1] = float("nan")
        with _backend(device):
            outputs = form.ours(tensors, sizes)
        # the pooled features of a head do not depend on the teacher
        checked = outputs[-1:] if name == "teacher" else outputs
        assert all(y.isnan().any() for y in checked), f"NaN in {name} does not reach the outputs"
    if form.name == "indices" and device.type == "cuda":
        tensors = {k: x.detach() for k, x in inputs_of(form, sizes, FP32, device).items()}
        tensors["target"][1] = sizes.teacher
        assert form.ours(tensors, sizes)[0].isnan(), "a class index out of range gives no NaN"


def _leaves(form: Form, tensors: Tensors) -> list[Tensor]:
    return [x for name, x in tensors.items() if name not in form.constant]


@contextmanager
def _backend(device: torch.device) -> Any:
    with featkd.use_backend("auto" if device.type == "cuda" else "reference"):
        yield


def _cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise NotHere("needs a GPU")


def no_wait(form: Form, device: torch.device) -> None:
    """Neither forward nor backward waits for the GPU."""
    _cuda(device)
    sizes = sizes_for(form, device)
    tensors = inputs_of(form, sizes, FP32, device)
    run_ours(form, tensors, sizes)  # kernels are compiled and loaded
    upstream = [torch.ones_like(y) for y in form.ours(tensors, sizes)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = form.ours(tensors, sizes)
        torch.autograd.grad(outputs, _leaves(form, tensors), upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def side_stream(form: Form, device: torch.device) -> None:
    """Kernels run on the current stream, after inputs that arrive late on it."""
    _cuda(device)
    sizes = sizes_for(form, device)
    tensors = inputs_of(form, sizes, FP32, device)
    want = run_ours(form, tensors, sizes)
    late = {
        k: torch.full_like(x.detach(), float("nan")) if x.is_floating_point() else x.detach()
        for k, x in tensors.items()
    }
    leaves = leaves_of(form, late)
    upstream = upstream_of(
        form.ours(tensors, sizes)
    )  # before the stream is busy: a copy from the CPU waits for it
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        for name, x in late.items():
            x.copy_(tensors[name].detach())
        got = results(form, leaves, form.ours(leaves, sizes), upstream)
    stream.synchronize()
    assert_close(got, want)


def second_device(form: Form, device: torch.device) -> None:
    """The op runs on a GPU that is not the current one."""
    _cuda(device)
    if torch.cuda.device_count() < 2:
        raise NotHere("needs a second GPU")
    sizes = sizes_for(form, device)
    want = run_ours(form, inputs_of(form, sizes, FP32, torch.device("cuda", 0)), sizes)
    with torch.cuda.device(0):
        got = run_ours(form, inputs_of(form, sizes, FP32, torch.device("cuda", 1)), sizes)
    assert_close({k: x.to("cuda:0") for k, x in got.items()}, want)


def cuda_graph(form: Form, device: torch.device, precision: Precision = FP32) -> None:
    """A CUDA graph captures forward and backward, and its replays read the inputs anew."""
    _cuda(device)
    sizes = sizes_for(form, device)
    tensors = inputs_of(form, sizes, precision, device)
    leaves = _leaves(form, tensors)

    def forward() -> tuple[Tensor, ...]:
        with precision.context(device):
            return form.ours(tensors, sizes)

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            outputs = forward()
            upstream = [torch.full_like(y, 0.5) for y in outputs]
            torch.autograd.grad(outputs, leaves, upstream)
        del outputs
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = forward()
        gradients = torch.autograd.grad(outputs, leaves, upstream)
    recorded = [*(y.detach() for y in outputs), *gradients]
    for factor in (1.0, -0.5, 2.0):
        with torch.no_grad():
            leaves[0].mul_(factor)
        graph.replay()
        once = [x.clone() for x in recorded]
        graph.replay()
        fresh = forward()
        assert featkd.last_backend(form.op) == backend_on(device)
        want = [*fresh, *torch.autograd.grad(fresh, leaves, upstream)]
        for number, (x, y) in enumerate(zip(once, recorded, strict=True)):
            assert torch.equal(x, y), f"result {number} of a replay does not repeat bitwise"
            # in a graph, with another workspace, a product may use another algorithm
            error = relative(x, want[number])
            allowed = close(precision, device)
            assert error <= allowed, f"result {number} of a replay differs by {error:.1e}"


def compiled(
    form: Form, device: torch.device, mode: str = "default", precision: Precision = FP32
) -> None:
    """`torch.compile(fullgraph=True)` keeps the kernels, forward and backward."""
    if mode != "default":
        _cuda(device)
    sizes = sizes_for(form, device)
    want = run_ours(form, inputs_of(form, sizes, precision, device), sizes, precision)
    allowed = close(precision, device, 1e-4)
    torch.compiler.reset()
    vars(backends._last).pop(form.op, None)
    options: dict[str, Any] = {"mode": mode} if device.type == "cuda" else {"backend": "aot_eager"}

    @torch.compile(fullgraph=True, dynamic=False, **options)
    def run(x: Tensors) -> tuple[Tensor, ...]:
        return form.ours(x, sizes)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):  # a CUDA graph is recorded in the second call, replayed from the third
            tensors = inputs_of(form, sizes, precision, device)
            if device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            with _backend(device), precision.context(device):
                outputs = run(tensors)
            got = results(form, tensors, outputs)
            assert_close({k: x.clone() for k, x in got.items()}, want, allowed)
    ran = featkd.last_backend(form.op)
    # code compiled for a CPU may not record its backend
    unknown = device.type == "cpu" and ran is None
    assert unknown or ran == backend_on(device), f"ran on {ran}"


def beyond_32_bits(form: Form, device: torch.device, elements: int = 2**31) -> None:
    """Maps of more than 2^31 elements give, for some images, the results of the plain form.

    Rows depend on each other only by the factor of the mean, which the upstream gradient corrects.
    """
    precision = PRECISIONS["bf16"]
    if device.type == "cpu":
        elements = 2**12
        precision = Precision(torch.float32, torch.float32)
    logits = form.op == "soft_kd"
    one = Sizes(1, (1, 1), 32768, 32768) if logits else Sizes(1, (14, 14), 32, 384)
    if device.type == "cpu":
        one = Sizes(1, (1, 1), 64, 64) if logits else Sizes(1, (3, 4), 8, 12)
    an_image = one.grid[0] * one.grid[1] * one.teacher
    batch = (elements // an_image // _PERIOD + 1) * _PERIOD
    sizes = Sizes(batch, one.grid, one.student, one.teacher)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        needed = 9 * batch * an_image * 2
        if free < needed:
            raise NotHere(f"needs {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free")
    tensors = _repeated(form, one, batch, precision, device)
    with _backend(device):
        outputs = form.ours(tensors, sizes)
    assert featkd.last_backend(form.op) == backend_on(device)
    first = next(k for k in tensors if k not in form.constant)  # the student's map
    ones = [torch.full_like(y, batch) if not y.dim() else torch.ones_like(y) for y in outputs]
    gradient_of_first, *_ = torch.autograd.grad(outputs, _leaves(form, tensors), ones)
    tolerance = 0.02 if precision.student == BF16 else _CLOSE
    for image in (0, 1, batch // 2, batch - 1):
        mine = {
            k: x[image : image + 1] if x.shape[0] == batch and k not in _PARAMETERS else x
            for k, x in tensors.items()
        }
        wide = leaves_of(form, mine, torch.float64)
        want = form.plain(wide, one)
        upstream = [torch.ones_like(y) for y in want]
        (gradient,) = torch.autograd.grad(want, [wide[first]], upstream)
        error = relative(gradient_of_first[image : image + 1], gradient)
        assert error <= tolerance, f"gradient of image {image} of {batch}: error {error:.1e}"
        for number, y in enumerate(outputs):
            if y.dim():
                error = relative(y[image : image + 1], want[number])
                assert error <= tolerance, f"output {number}, image {image}: error {error:.1e}"
    repeats = leaves_of(form, _repeated(form, one, _PERIOD, precision, device), torch.float64)
    few = Sizes(_PERIOD, one.grid, one.student, one.teacher)
    for y, mean in zip(outputs, form.plain(repeats, few), strict=True):
        error = 0.0 if y.dim() else relative(y, mean)
        assert error <= tolerance / 10, f"loss: error {error:.1e}"


_PERIOD = 4
_PARAMETERS = ("weight", "bias", "norm_weight", "norm_bias", "proj_norm_weight", "proj_norm_bias",
               "norm1_weight", "norm1_bias")  # fmt: skip


def _repeated(
    form: Form, one: Sizes, batch: int, precision: Precision, device: torch.device
) -> Tensors:
    """Returns inputs of `batch` images that repeat four images, so that few numbers are drawn."""
    few = Sizes(_PERIOD, one.grid, one.student, one.teacher)
    drawn = inputs_of(form, few, precision, device)
    found = {}
    for name, x in drawn.items():
        times = 1 if name in _PARAMETERS else batch // _PERIOD
        found[name] = x.detach().repeat(times, *[1] * (x.dim() - 1))
    return leaves_of(form, found)


Check = Callable[[Form, torch.device], None]


def _named(name: str, check: Callable[..., None], **options: Any) -> Check:
    """A check with options, under another name."""
    named = update_wrapper(partial(check, **options), check)
    named.__name__ = name  # type: ignore[attr-defined]
    return named


def _in_others(check: Callable[..., None]) -> tuple[Check, ...]:
    """A check in each of the other precisions, named after them."""
    name = check.__name__
    return tuple(_named(f"{name}_{other}", check, precision=x) for other, x in OTHERS.items())


QUICK: tuple[Check, ...] = (
    views, expanded, not_a_number, no_wait, side_stream, second_device, cuda_graph,
    *_in_others(cuda_graph),
)  # fmt: skip
# the slowest come last: they are the first that a time limit cuts
COMPILED: tuple[Check, ...] = (
    compiled,
    *_in_others(compiled),
    _named("reduce_overhead", compiled, mode="reduce-overhead"),
    _named("max_autotune", compiled, mode="max-autotune"),
)
LARGE: tuple[Check, ...] = (beyond_32_bits,)
